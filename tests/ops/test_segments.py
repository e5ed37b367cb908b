"""Packed segments against separate calls, in float64, gradients and final states included."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf import ops
from elita_tf.ops import running, segments
from tests import helpers, oracles
from tests.helpers import HEADS, KEY_DIM, VALUE_DIM

# The lengths of the segments of each row: of 1 position, longer than a chunk, many in a chunk.
LENGTHS = ((1, 40, 3, 1, 1, 2, 23), (30, 1, 33, 7))
BATCH, TIME = len(LENGTHS), sum(LENGTHS[0])
# Row 0's names repeat, as a name needs to differ from that before it only.
SEGMENT_IDS = np.array(
    [np.repeat([3, 7, 3, -1, 0, 4, 3], LENGTHS[0]), np.repeat([5, 6, 7, 8], LENGTHS[1])], "int32"
)


def decayed(form: Callable) -> Callable:
    """A form of attention2 with log_decay before the state."""

    def function(*arguments: Any, **options: Any) -> tuple:
        *inputs, log_decay, state = arguments
        return form(*inputs, state, log_decay=log_decay, **options)

    return function


FORMS: dict[str, Callable] = {
    "attention2": ops.attention2,
    "attention2_recurrent": ops.attention2_recurrent,
    "decayed attention2": decayed(ops.attention2),
    "decayed attention2_recurrent": decayed(ops.attention2_recurrent),
    "gla": partial(ops.gated_linear_attention, chunk_size=8),
    "gla_recurrent": ops.gated_linear_attention_recurrent,
}
STEPS = {
    "attention2": ops.attention2_step,
    "decayed attention2": decayed(ops.attention2_step),
    "gla": ops.gated_linear_attention_step,
}
EVERY_FORM = pytest.mark.parametrize("name", FORMS)
FAST = pytest.mark.parametrize("name", STEPS)


def make_arguments(name: str) -> list:
    """The inputs of an op in float64 and an initial state."""
    rng = np.random.default_rng(1)
    value = rng.standard_normal((BATCH, TIME, HEADS, VALUE_DIM))
    if "attention2" in name:
        logits = [2 * rng.standard_normal((BATCH, TIME, HEADS)) for _ in range(3)]
        leaves = [rng.standard_normal((BATCH, HEADS, *d)) for d in ((), (VALUE_DIM,), ())]
        state = ops.Attention2State(*leaves[:2], np.exp(leaves[2]))
        decay = [-np.exp(rng.standard_normal((BATCH, TIME, HEADS)))] if "decayed" in name else []
        return [*logits, value, *decay, state]
    query, key, decay = (rng.standard_normal((BATCH, TIME, HEADS, KEY_DIM)) for _ in range(3))
    state = rng.standard_normal((BATCH, HEADS, KEY_DIM, VALUE_DIM))
    return [query, key, value, -np.exp(decay), state]


def row_of(state: Any, row: int) -> Any:
    return keras.tree.map_structure(lambda leaf: leaf[row : row + 1], state)


def separate(form: Callable) -> Callable:
    """The form called once per segment, the first of a row on the initial state."""

    def function(*arguments: Any) -> tuple:
        *inputs, state = arguments
        outputs, finals = [], []
        for row, lengths in enumerate(LENGTHS):
            pieces, start, final = [], 0, row_of(state, row)
            for length in lengths:
                piece = [x[row : row + 1, start : start + length] for x in inputs]
                result, final = form(*piece, final if start == 0 else None)
                pieces.append(result)
                start += length
            outputs.append(keras.ops.concatenate(pieces, axis=1))
            finals.append(final)
        joined = keras.tree.map_structure(lambda *x: keras.ops.concatenate(x), *finals)
        return keras.ops.concatenate(outputs), joined

    return function


def cotangents_of(name: str, arguments: list) -> list[np.ndarray]:
    oracle = oracles.attention2 if "attention2" in name else oracles.gated_linear_attention
    oracle = decayed(oracle) if "decayed" in name else oracle
    return helpers.random_like(oracle(*arguments))


@cache
def expected_vjp(op: str) -> helpers.Vjp:
    """Of `make_arguments`, from separate calls of the fast form."""
    arguments = make_arguments(op)
    return helpers.vjp(separate(FORMS[op]), arguments, cotangents_of(op, arguments))


@EVERY_FORM
def test_packed_segments_are_separate_calls(name: str) -> None:
    arguments = make_arguments(name)
    packed = partial(FORMS[name], segment_ids=SEGMENT_IDS)
    received = helpers.vjp(packed, arguments, cotangents_of(name, arguments))
    expected = expected_vjp(name.removesuffix("_recurrent"))
    helpers.assert_close(received.outputs, expected.outputs, 1e-10)
    helpers.assert_close(received.gradients, expected.gradients, 1e-10)


@FAST
def test_compiled_by_xla(name: str) -> None:
    arguments = make_arguments(name)
    packed = partial(FORMS[name], segment_ids=SEGMENT_IDS)
    cotangents = cotangents_of(name, arguments)
    received = helpers.vjp(packed, arguments, cotangents, helpers.xla)
    expected = expected_vjp(name.removesuffix("_recurrent"))
    helpers.assert_close(received.outputs, expected.outputs, 1e-10)
    helpers.assert_close(received.gradients, expected.gradients, 1e-10)


@helpers.tensorflow_only
@FAST
def test_a_graph_of_unknown_batch_and_time(name: str) -> None:
    import tensorflow as tf

    *inputs, state = make_arguments(name)

    @tf.function(reduce_retracing=True)
    def packed(inputs: list, state: Any, segment_ids: Any) -> tuple:
        return FORMS[name](*inputs, state, segment_ids=segment_ids)

    signature = [
        [tf.TensorSpec([None, None, *x.shape[2:]], "float64") for x in inputs],
        keras.tree.map_structure(lambda x: tf.TensorSpec([None, *x.shape[1:]], x.dtype), state),
        tf.TensorSpec([None, None], "int32"),
    ]
    traced = packed.get_concrete_function(*signature)
    for rows, time in ((BATCH, TIME), (1, 45), (1, 1)):
        arrays = keras.tree.map_structure(keras.ops.convert_to_tensor, [inputs, state, SEGMENT_IDS])
        x, s, ids = arrays
        piece = [each[:rows, :time] for each in x]
        initial = keras.tree.map_structure(lambda leaf, rows=rows: leaf[:rows], s)
        received = traced(piece, initial, ids[:rows, :time])
        expected = FORMS[name](*piece, initial, segment_ids=ids[:rows, :time])
        helpers.assert_close(helpers.leaves(received), helpers.leaves(expected), 1e-14)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in FORMS if "attention2" in name])
def test_loud_keys_of_a_former_segment_do_no_harm(name: str) -> None:
    arguments = make_arguments(name)
    # 1e4 and -1e4 in turns, and the other way round in the second row.
    number = np.cumsum(np.array(segments.segment_starts(SEGMENT_IDS)).astype(int), axis=1)
    arguments[0] += 1e4 * (-1.0) ** (number + np.arange(BATCH)[:, None])[..., None]
    arguments[0][1, 30], arguments[0][0, 41:44] = -np.inf, -np.inf
    cotangents = cotangents_of(name, arguments)
    packed = partial(FORMS[name], segment_ids=SEGMENT_IDS)
    received = helpers.vjp(packed, arguments, cotangents)
    fast = FORMS[name.removesuffix("_recurrent")]
    expected = helpers.vjp(separate(fast), arguments, cotangents)
    helpers.assert_finite([*received.outputs, *received.gradients])
    helpers.assert_close(received.outputs, expected.outputs, 1e-10)
    helpers.assert_jointly_close(received.gradients, expected.gradients, 1e-10)


@FAST
def test_no_output_depends_on_another_segment(name: str) -> None:
    arguments = make_arguments(name)
    changed = [x.copy() for x in arguments[:-1]] + [arguments[-1]]
    for x in changed[:-1]:
        x[0, 1:41] *= 7.0  # its second segment
        x[1, 31:64] *= 7.0  # its third
    packed = partial(FORMS[name], segment_ids=SEGMENT_IDS)
    (before, *state), (after, *other) = (helpers.leaves(packed(*a)) for a in (arguments, changed))
    same = (before == after).all(axis=(2, 3))
    np.testing.assert_array_equal(~same[0], SEGMENT_IDS[0] == 7)
    np.testing.assert_array_equal(~same[1], SEGMENT_IDS[1] == 7)
    assert all(np.array_equal(*pair) for pair in zip(state, other, strict=True))


@FAST
def test_steps_restart_where_a_segment_starts(name: str) -> None:
    *inputs, state = make_arguments(name)
    expected, final = FORMS[name](*inputs, state, segment_ids=SEGMENT_IDS)
    starts = np.array(segments.segment_starts(SEGMENT_IDS))
    for i in range(TIME):
        position = [x[:, i] for x in inputs]
        outputs, state = STEPS[name](*position, state, segment_start=starts[:, i])
        helpers.assert_close(helpers.leaves(outputs), helpers.leaves(expected[:, i]), 1e-12)
    helpers.assert_close(helpers.leaves(state), helpers.leaves(final), 1e-12)


@pytest.mark.parametrize("form", [ops.attention2, ops.attention2_recurrent])
def test_decays_whose_sum_is_no_number_forget(form: Callable) -> None:
    """The smallest number twice is -inf, before which nothing counts."""
    *inputs, log_decay, state = make_arguments("decayed attention2")
    inputs[0][:, 4:7] = -np.inf
    received, expected = (
        helpers.leaves(form(*inputs, state, log_decay=log_decay))
        for log_decay[:, 4:6] in (np.finfo("float64").min, -np.inf)
    )
    helpers.assert_finite(received)
    helpers.assert_close(received, expected, 1e-14)


def test_a_running_maximum_forgets_what_came_before_a_start() -> None:
    rng = np.random.default_rng(0)
    starts = rng.random((BATCH, 131, 1)) < 0.05
    for x in (rng.standard_normal((BATCH, 131, HEADS)), rng.integers(-9, 9, (BATCH, 131, HEADS))):
        maximum, expected = x.max(axis=1), []
        initial = maximum
        for t in range(131):
            maximum = np.where(starts[:, t], x[:, t], np.maximum(maximum, x[:, t]))
            expected.append(maximum)
        (received,) = helpers.leaves(running.running_maximum(x, initial, starts))
        assert np.array_equal(received, np.stack(expected, axis=1))


@EVERY_FORM
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SEGMENT_IDS[:, :-1], "Axis 1 of `segment_ids` has 70 elements, that of .* has 71"),
        (SEGMENT_IDS[:1], "Axis 0 of `segment_ids` has 1 elements"),
        (SEGMENT_IDS.astype("float32"), "`segment_ids` of .* expected integers, received float32"),
        (SEGMENT_IDS.tolist(), "`segment_ids` is not an array"),
    ],
)
def test_mistakes_are_explained(name: str, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FORMS[name](*make_arguments(name), segment_ids=wrong)


@FAST
def test_a_start_of_a_step_is_a_boolean_of_every_row(name: str) -> None:
    *inputs, state = make_arguments(name)
    position = [x[:, 0] for x in inputs]
    with pytest.raises(ValueError, match="`segment_start` of .* expected booleans, received int32"):
        STEPS[name](*position, state, segment_start=SEGMENT_IDS[:, 0])
    with pytest.raises(ValueError, match="Axis 0 of `segment_start` has 1 elements"):
        STEPS[name](*position, state, segment_start=np.array([True]))
