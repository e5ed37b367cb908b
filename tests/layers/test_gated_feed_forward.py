"""The GatedFeedForward layer against its equation."""

import numpy as np
import pytest

from elita_tf.layers import GatedFeedForward
from tests import helpers, oracles
from tests.helpers import BATCH, LAYER_BOUND, TIME, randomized

WIDTH, INNER = 10, 6


@pytest.mark.parametrize("shape", [(BATCH, TIME, WIDTH), (5, WIDTH)])
@pytest.mark.parametrize("activation", ["silu", "tanh"])
def test_equation(shape: tuple[int, ...], activation: str) -> None:
    layer = GatedFeedForward(INNER, activation, dtype="float64")
    layer.build((None, None, WIDTH))
    randomized(layer)
    inputs = np.random.default_rng(3).standard_normal(shape)
    projections = layer.gate_projection, layer.value_projection, layer.output_projection
    gate, value, output = helpers.leaves([projection.kernel for projection in projections])
    logits = inputs @ gate
    activated = np.tanh(logits) if activation == "tanh" else logits * oracles.sigmoid(logits)
    expected = (activated * (inputs @ value)) @ output
    helpers.assert_close(helpers.leaves(layer(inputs)), [expected], LAYER_BOUND)
    assert len(layer.weights) == 3


@pytest.mark.parametrize(("width", "inner"), [(12, 32), (10, 32), (64, 176)])
def test_default_inner_dim_is_eight_thirds_in_multiples_of_eight(width: int, inner: int) -> None:
    layer = GatedFeedForward()
    layer.build((None, None, width))
    assert tuple(layer.output_projection.kernel.shape) == (inner, width)
