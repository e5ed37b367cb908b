"""The FeedForward2 layer against loops over its weights."""

import numpy as np
import pytest

from elita_tf.layers import FeedForward2
from tests import helpers, oracles
from tests.helpers import BATCH, LAYER_BOUND, TIME, randomized

WIDTH, INNER, RANK = 10, 6, 4


def make_layer(**arguments: object) -> FeedForward2:
    layer = FeedForward2(INNER, RANK, **{"dtype": "float64", **arguments})
    layer.build((None, None, WIDTH))
    return randomized(layer)


def silu(x: np.ndarray) -> np.ndarray:
    return x * oracles.sigmoid(x)


@pytest.mark.parametrize("shape", [(BATCH, TIME, WIDTH), (5, WIDTH), (BATCH, 3, TIME, WIDTH)])
@pytest.mark.parametrize(("activation", "function"), [("silu", silu), ("tanh", np.tanh)])
def test_equation(shape: tuple[int, ...], activation: str, function) -> None:
    layer = make_layer(activation=activation)
    inputs = np.random.default_rng(3).standard_normal(shape)
    first, first_bias, second, second_bias, kernel, bias = helpers.leaves(
        [
            layer.first_projection.kernel,
            layer.first_projection.bias,
            layer.second_projection.kernel,
            layer.second_projection.bias,
            layer.kernel,
            layer.bias,
        ]
    )
    factors = function(inputs @ first + first_bias), function(inputs @ second + second_bias)
    expected = oracles.feed_forward2(*factors, kernel) + bias
    helpers.assert_close(helpers.leaves(layer(inputs)), [expected], LAYER_BOUND)


def test_default_sizes() -> None:
    layer = FeedForward2()
    layer.build((None, None, WIDTH))
    assert tuple(layer.kernel.shape) == (WIDTH, 8, WIDTH)


def test_kernel_is_initialised_as_the_matrix_it_is() -> None:
    layer = FeedForward2(40, 30)
    layer.build((None, 20))
    limit = np.sqrt(6 / (40 * 30 + 20))  # Glorot for 1,200 inputs and 20 outputs
    largest = np.abs(helpers.leaves(layer.kernel)[0]).max()
    assert 0.95 * limit < largest <= limit
    assert not helpers.leaves(layer.bias)[0].any()
