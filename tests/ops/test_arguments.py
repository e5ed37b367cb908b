"""What can be mistyped in a call of an op is a ValueError: received, expected, fix."""

from typing import Any

import numpy as np
import pytest

from elita_tf import ops
from elita_tf.ops.arguments import require_shapes
from tests import helpers
from tests.helpers import BATCH, HEADS, HIDDEN, KEY_DIM, TIME, VALUE_DIM


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, "float32")


LOGITS, VALUE = (BATCH, TIME, HEADS), (BATCH, TIME, HEADS, VALUE_DIM)
KEY = (BATCH, TIME, HEADS, KEY_DIM)
STATE = {"max_logit": (BATCH, HEADS), "numerator": (BATCH, HEADS, VALUE_DIM)}
ATTENTION2 = {"key_logits": LOGITS, "query_logits": LOGITS, "self_logits": LOGITS, "value": VALUE}
ATTENTION2["log_decay"] = LOGITS
GLA = {"query": KEY, "key": KEY, "value": VALUE, "log_decay": KEY}
GLA_STATE = (BATCH, HEADS, KEY_DIM, VALUE_DIM)
FEED_FORWARD = {"first": (BATCH, 4), "second": (BATCH, 3), "kernel": (4, 3, HIDDEN)}
CROSS_ENTROPY = {"hidden": (BATCH, TIME, HIDDEN), "kernel": (11, HIDDEN), "labels": (BATCH, TIME)}
# Per op: the shapes of its arguments, all floating but the labels.
CALLS: dict[str, dict[str, tuple]] = {
    "attention2": ATTENTION2,
    "attention2_recurrent": ATTENTION2,
    "attention2_step": {name: (s[0], *s[2:]) for name, s in ATTENTION2.items()},
    "gated_linear_attention": {**GLA, "initial_state": GLA_STATE},
    "gated_linear_attention_recurrent": {**GLA, "initial_state": GLA_STATE},
    "gated_linear_attention_step": {
        **{name: (s[0], *s[2:]) for name, s in GLA.items()},
        "state": GLA_STATE,
    },
    "feed_forward2": FEED_FORWARD,
    "linear_cross_entropy": CROSS_ENTROPY,
    "token_cross_entropy": CROSS_ENTROPY,
}
# An axis of a size that another argument has, too: the last one but for these.
SHARED = {"value": -2, "kernel": 1}
MISTAKES = [
    (name, argument, mistake)
    for name, shapes in CALLS.items()
    for argument in shapes
    for mistake in ("axis too many", "axis too few", "another size", "none", "list", "dtype")
    # A decay may be absent.
    if mistake != "none" or "attention2" not in name or argument != "log_decay"
]


def call(name: str, **changes: Any) -> Any:
    arguments: dict[str, Any] = {argument: ones(*shape) for argument, shape in CALLS[name].items()}
    if "labels" in arguments:
        arguments["labels"] = np.ones(CALLS[name]["labels"], "int32")
    if name == "attention2_step":
        arguments["state"] = ops.attention2_empty_state(BATCH, HEADS, VALUE_DIM)
    return getattr(ops, name)(**{**arguments, **changes})


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right_without_a_mistake(name: str) -> None:
    helpers.assert_finite(helpers.leaves(call(name))[:1])


@pytest.mark.parametrize(("name", "argument", "mistake"), MISTAKES)
def test_a_mistake_is_named(name: str, argument: str, mistake: str) -> None:
    shape = CALLS[name][argument]
    array = np.ones(shape, "int32" if argument == "labels" else "float32")
    if mistake == "dtype" and argument in ("labels", "state", "initial_state"):
        assert helpers.leaves(call(name, **{argument: array.astype("int64")}))
        return
    if mistake == "none" and argument == "initial_state":
        return  # Its default.
    wrong = {
        "axis too many": array[..., None],
        "axis too few": array[0],
        "another size": np.concatenate([array, array], axis=SHARED.get(argument, -1)),
        "none": None,
        "list": array.tolist(),
        "dtype": array.astype("int64"),
    }[mistake]
    with pytest.raises(ValueError) as caught:
        call(name, **{argument: wrong})
    if mistake == "dtype":
        assert f"`{argument}` of {name}: expected floating-point" in str(caught.value)
    else:
        assert f"{name} received " in str(caught.value) and ": expected " in str(caught.value)


@pytest.mark.parametrize("name", [n for n in CALLS if "gated" in n or "attention2" in n])
def test_sizes_that_would_be_broadcast_are_refused(name: str) -> None:
    for argument, shape in CALLS[name].items():
        # The last axis of values is their own where there is no state.
        for axis in range(len(shape) - (name.startswith("attention2") and argument == "value")):
            one = [1 if i == axis else size for i, size in enumerate(shape)]
            with pytest.raises(ValueError, match=f"{name} received .*elements, that of `"):
                call(name, **{argument: ones(*one)})
            none = [0 if i == axis else size for i, size in enumerate(shape)]
            with pytest.raises(ValueError, match="has 0 elements"):
                call(name, **{argument: ones(*none)})


def test_features_that_would_be_read_in_another_order_are_refused() -> None:
    with pytest.raises(
        ValueError, match="Axis 1 of `kernel` has 4 elements, that of `hidden` has 8"
    ):
        ops.linear_cross_entropy(ones(2, 8), ones(5, 4), np.zeros(4, "int32"))
    with pytest.raises(ValueError, match="Axis 0 of `second`"):
        ops.feed_forward2(ones(2, 4), ones(3, 3), ones(4, 3, 6))
    with pytest.raises(ValueError, match=r"Axis 0 of `labels` has \(13, 2\) elements"):
        call("linear_cross_entropy", labels=np.zeros((TIME, BATCH), "int32"))


@pytest.mark.parametrize("shape", [(TIME, BATCH), (3,), (BATCH, TIME, 1), (1, 1, 1)])
def test_weights_of_another_shape_than_the_labels(shape: tuple) -> None:
    with pytest.raises(ValueError, match=r"`sample_weight` .*theirs, \(2, 13\), received \("):
        call("linear_cross_entropy", sample_weight=ones(*shape))
    for fits in ((BATCH, TIME), (BATCH, 1), (TIME,), (1,), ()):
        assert helpers.leaves(call("linear_cross_entropy", sample_weight=ones(*fits)))[0] > 0


@pytest.mark.parametrize("name", ["attention2", "attention2_recurrent", "attention2_step"])
def test_a_state_that_is_none_of_attention2(name: str) -> None:
    keyword = "state" if name.endswith("step") else "initial_state"
    good = ops.attention2_empty_state(BATCH, HEADS, VALUE_DIM)
    for state in (ones(BATCH, HEADS), good._asdict(), list(good), good[:2], "state"):
        with pytest.raises(ValueError, match=f"The state of {name}: expected an `Attention2State`"):
            call(name, **{keyword: state})
    for sizes in ((1, HEADS, VALUE_DIM), (BATCH, 1, VALUE_DIM), (BATCH, HEADS, 1), (3, 4, 5)):
        with pytest.raises(ValueError, match=f"{name} received .*max_logit"):
            call(name, **{keyword: ops.attention2_empty_state(*sizes)})


@pytest.mark.parametrize("size", [0, -1, 2.5, "3", None, True])
def test_sizes_that_count_nothing(size: Any) -> None:
    with pytest.raises(ValueError, match=rf"`chunk_size`.*{size!r}"):
        call("gated_linear_attention", chunk_size=size)
    for sizes in ((size, 2, 2), (2, size, 2), (2, 2, size)):
        with pytest.raises(ValueError, match=rf"attention2_empty_state counts.*{size!r}"):
            ops.attention2_empty_state(*sizes)


def test_a_scale_that_is_no_number() -> None:
    for name in CALLS:
        if "gated" in name:
            with pytest.raises(ValueError, match=f"`scale` of {name}.*'half'"):
                call(name, scale="half")


@helpers.tensorflow_only
def test_unknown_sizes_agree_with_all_and_known_ones_are_checked_while_tracing() -> None:
    import tensorflow as tf

    unknown = tf.TensorSpec([None, None, HEADS], "float32")
    other = tf.TensorSpec([None, None, HEADS + 1, None], "float32")
    anything = tf.TensorSpec(None, "float32")

    def trace(*specs: Any) -> Any:
        @tf.function(input_signature=specs)
        def check(x: Any, y: Any) -> None:
            require_shapes("f", x=(x, "batch time heads"), y=(y, "batch time heads value_dim"))

        return check.get_concrete_function().graph

    for fits in (anything, tf.TensorSpec([BATCH, None, HEADS, 1])):
        operations = trace(unknown, fits).get_operations()
        assert {operation.type for operation in operations} == {"Placeholder"}
    with pytest.raises(ValueError, match="Axis 2 of `y` has 4 elements, that of `x` has 3"):
        trace(unknown, other)
