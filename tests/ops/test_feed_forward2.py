"""feed_forward2 against loops over inner, rank and hidden."""

from functools import partial

import numpy as np
import pytest

from elita_tf.ops import feed_forward2, slicing
from tests import helpers, oracles
from tests.helpers import BATCH, HIDDEN, TIME

INNER, RANK = 6, 4


def make_inputs(leading: tuple[int, ...] = (BATCH, TIME)) -> list[np.ndarray]:
    rng = np.random.default_rng(len(leading))
    shapes = (*leading, INNER), (*leading, RANK), (INNER, RANK, HIDDEN)
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize("transform", [helpers.eager, helpers.xla], ids=["eager", "xla"])
@pytest.mark.parametrize("leading", [(3,), (BATCH, TIME), (BATCH, TIME, 5)])
def test_values_and_gradients_are_exact(leading: tuple[int, ...], transform) -> None:
    inputs = make_inputs(leading)
    expected = oracles.feed_forward2(*inputs)
    (cotangent,) = helpers.random_like(expected)
    result = helpers.vjp(feed_forward2, inputs, [cotangent], transform)
    helpers.assert_close(result.outputs, [expected], 1e-10)
    gradients = oracles.feed_forward2_gradients(*inputs, cotangent)
    helpers.assert_close(result.gradients, gradients, 1e-10)


def test_one_position_by_hand() -> None:
    first, second = np.array([2.0, -1.0]), np.array([3.0, 5.0, 0.5])
    kernel = np.arange(6.0).reshape(2, 3, 1)
    # 2 * (0 * 3 + 1 * 5 + 2 * 0.5) - 1 * (3 * 3 + 4 * 5 + 5 * 0.5)
    outputs = feed_forward2(first[None], second[None], kernel)
    assert helpers.leaves(outputs)[0].tolist() == [[-19.5]]


@helpers.tensorflow_only
def test_a_batch_of_none_whose_size_is_unknown() -> None:
    import tensorflow as tf

    shapes = (None, TIME, INNER), (None, TIME, RANK), (INNER, RANK, HIDDEN)
    specs = [tf.TensorSpec(shape, "float64") for shape in shapes]

    @partial(tf.function, input_signature=specs)
    def value_and_gradients(*inputs: tf.Tensor) -> tuple:
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = feed_forward2(*inputs)
        return outputs, tape.gradient(outputs, inputs)

    first, second, kernel = make_inputs()
    outputs, gradients = value_and_gradients(first[:0], second[:0], kernel)
    assert outputs.shape == (0, TIME, HIDDEN)
    assert [x.shape for x in gradients] == [first[:0].shape, second[:0].shape, kernel.shape]
    assert not gradients[2].numpy().any()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-5), ("bfloat16", 2e-2)])
def test_low_precision_inputs(dtype: str, bound: float) -> None:
    low = helpers.cast(make_inputs(), dtype)
    inputs = [x.astype("float64") for x in helpers.leaves(low)]
    expected = oracles.feed_forward2(*inputs)
    (cotangent,) = helpers.random_like(expected)
    result = helpers.vjp(feed_forward2, low, [cotangent])
    helpers.assert_close(result.outputs, [expected], bound)
    gradients = oracles.feed_forward2_gradients(*inputs, cotangent)
    helpers.assert_close(result.gradients, gradients, bound)


def test_sums_over_slices_of_bfloat16_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added up in bfloat16, the products of 100 slices would be 0.8 % off."""
    monkeypatch.setattr(slicing, "_MIN_TOKENS", 3)
    monkeypatch.setattr(slicing, "_ELEMENTS", 1)
    low = helpers.cast([np.abs(x) for x in make_inputs((300,))], "bfloat16")
    inputs = [x.astype("float64") for x in helpers.leaves(low)]
    cotangent = np.ones((300, HIDDEN))
    kernel = helpers.vjp(feed_forward2, low, [cotangent]).gradients[2]
    expected = oracles.feed_forward2_gradients(*inputs, cotangent)[2]
    helpers.assert_close(kernel, expected, 2e-3)


@helpers.tensorflow_only
def test_one_graph_serves_every_batch_and_length() -> None:
    inputs = make_inputs()
    run = helpers.dynamic_vjp(feed_forward2, inputs, oracles.feed_forward2(*inputs), {BATCH, TIME})
    for leading in ((1, 1), (BATCH, TIME), (5, 17)):
        inputs = make_inputs(leading)
        cotangents = helpers.random_like(oracles.feed_forward2(*inputs))
        expected = helpers.vjp(feed_forward2, inputs, cotangents)
        helpers.assert_close(run(inputs, cotangents), expected, 1e-12)


@helpers.tensorflow_only
def test_cost_is_linear_in_time() -> None:
    costs = []
    for time in (256, 1024):
        shapes = [(BATCH, time, INNER), (BATCH, time, RANK), (INNER, RANK, HIDDEN)]
        costs.append(helpers.traced_cost(feed_forward2, shapes, [(BATCH, time, HIDDEN)]))
    assert costs[0].operations == costs[1].operations
    assert costs[1].largest <= 4 * costs[0].largest
