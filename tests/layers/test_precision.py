"""Layers under policies and defaults of Keras that mix dtypes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf import layers, ops
from tests import helpers
from tests.helpers import BATCH, HEADS, TIME
from tests.mixers import MAIN, WIDTH

FACTORIES: dict[str, Callable[..., keras.layers.Layer]] = {
    **MAIN,
    "feed_forward2": lambda **k: layers.FeedForward2(5, 3, **k),
    "swiglu": lambda **k: layers.GatedFeedForward(5, **k),
}
LAYERS = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
POLICIES = {
    "value": {".*/value": "mixed_bfloat16"},
    "key": {".*/key": "mixed_bfloat16"},
    "factors": {".*/(first|gate|output_gate|logits)": "mixed_bfloat16"},
    "norm": {".*/norm": "mixed_bfloat16"},
}


def make_layer(factory: Callable, dtype: Any) -> keras.layers.Layer:
    keras.utils.set_random_seed(5)
    layer = factory(dtype=dtype)
    layer.build((None, None, WIDTH))
    return layer


def make_inputs() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH)).astype("float32")


FLOATX = ("float16", "bfloat16")


@contextlib.contextmanager
def default_dtype(floatx: str) -> Iterator[None]:
    """Keras' default dtype is this one for a while."""
    before = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


def outputs_and_gradients(layer: keras.layers.Layer, transform: Callable) -> list[np.ndarray]:
    weights = [variable.value for variable in layer.trainable_variables]
    constants = [variable.value for variable in layer.non_trainable_variables]

    def call(x: Any, weights: list) -> Any:
        return layer.stateless_call(weights, constants, x)[0]

    return [*helpers.vjp(call, [make_inputs(), weights], [make_inputs()], transform)]


@pytest.mark.every_case
@pytest.mark.parametrize("size", [32.0, 100.0])
@pytest.mark.parametrize("name", MAIN)
def test_float16_holds_large_inputs(name: str, size: float) -> None:
    """GLA's sums hold products of three terms. Feed-forwards are left out: at 100, their outputs
    themselves can be larger than a float16 holds."""
    x = keras.ops.convert_to_tensor(size * make_inputs())
    exact, half = (make_layer(FACTORIES[name], each) for each in ("float32", "mixed_float16"))
    outputs = [helpers.leaves(keras.ops.cast(layer(x), "float32"))[0] for layer in (exact, half)]
    helpers.assert_close(outputs[1], outputs[0], 5e-2)
    if hasattr(half, "call_with_state"):
        one, _ = half.call_with_state(x[:, :1], half.get_initial_state(BATCH))
        helpers.assert_close(
            helpers.leaves(keras.ops.cast(one, "float32"))[0], outputs[0][:, :1], 5e-2
        )
    run = helpers.differentiated(half, [x])
    cotangent = keras.ops.convert_to_tensor(1e-2 * make_inputs())
    helpers.assert_finite(helpers.leaves(helpers.jitted(run)([x], [cotangent])[1]))


@pytest.mark.long
@LAYERS
def test_a_16_bit_default_changes_nothing_in_a_graph(factory: Callable) -> None:
    expected = outputs_and_gradients(make_layer(factory, "float32"), helpers.xla)
    for floatx in FLOATX:
        with default_dtype(floatx):
            received = outputs_and_gradients(make_layer(factory, "float32"), helpers.graph)
        helpers.assert_close(received, expected, 1e-6)


@pytest.mark.long
def test_a_16_bit_default_changes_no_loss_and_no_definition() -> None:
    rng = np.random.default_rng(3)
    hidden, kernel = (rng.standard_normal(s).astype("float32") for s in ((TIME, 5), (7, 5)))
    logits = rng.standard_normal((BATCH, TIME, HEADS)).astype("float32")
    value = rng.standard_normal((BATCH, TIME, HEADS, 5)).astype("float32")

    def figures() -> list[Any]:
        loss = helpers.graph(ops.linear_cross_entropy)(hidden, kernel, np.arange(TIME) % 7)
        gla = helpers.graph(ops.gated_linear_attention_recurrent)(value, value, value, -(value**2))
        attention2 = helpers.graph(ops.attention2_recurrent)(logits, logits, logits, value)
        return helpers.leaves([loss, gla, attention2])

    expected = figures()
    for floatx in FLOATX:
        with default_dtype(floatx):
            helpers.assert_close(figures(), expected, 1e-6)


@LAYERS
@pytest.mark.parametrize("policies", POLICIES.values(), ids=POLICIES)
def test_sublayers_of_two_policies(factory: Callable, policies: dict[str, str]) -> None:
    policies = {path: keras.DTypePolicy(name) for path, name in policies.items()}
    layer = make_layer(factory, keras.dtype_policies.DTypePolicyMap("float32", policies))
    exact, inputs = make_layer(factory, "float32"), make_inputs()
    # A path of the map may belong to another layer.
    mixes = any(each.compute_dtype == "bfloat16" for each in layer._flatten_layers())
    received, expected = helpers.leaves(layer(inputs))[0], helpers.leaves(exact(inputs))[0]
    helpers.assert_close([received], [expected], 3e-2)
    assert mixes == (helpers.relative_error(received, expected) > 1e-5)
    if hasattr(layer, "call_with_state"):
        state = layer.get_initial_state(BATCH)
        _, state = layer.call_with_state(inputs[:, :7], state)
        outputs, _ = layer.call_with_state(inputs[:, 7:], state)
        helpers.assert_close(helpers.leaves(outputs), [expected[:, 7:]], 3e-2)
