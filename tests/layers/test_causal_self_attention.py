"""The CausalSelfAttention layer against rotary softmax attention written as loops."""

import numpy as np
import pytest

from elita_tf.layers import CausalSelfAttention
from tests import helpers
from tests.helpers import BATCH, HEADS, LAYER_BOUND, TIME, randomized

WIDTH, HEAD_DIM = 18, 6


def make_layer(context_length: int) -> CausalSelfAttention:
    layer = CausalSelfAttention(HEADS, context_length, dtype="float64")
    layer.build((None, None, WIDTH))
    return randomized(layer, scale=0.3)


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    """Pairs (f, f + half) turned by position / 10000^(f / half), as complex numbers."""
    half = HEAD_DIM // 2
    angles = position * 10000.0 ** (-np.arange(half) / half)
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


@pytest.mark.parametrize("context_length", [4, 20])
def test_equation(context_length: int) -> None:
    layer = make_layer(context_length)
    inputs = np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH))
    query, key, value, output = helpers.leaves(
        [
            layer.query_projection.kernel,
            layer.key_projection.kernel,
            layer.value_projection.kernel,
            layer.output_projection.kernel,
        ]
    )
    expected = np.zeros_like(inputs)
    for row, head, i in np.ndindex(BATCH, HEADS, TIME):
        x = inputs[row]
        seen = range(max(0, i - context_length + 1), i + 1)
        turned = rotated(x[i] @ query[:, head], i)
        scores = [turned @ rotated(x[j] @ key[:, head], j) / HEAD_DIM**0.5 for j in seen]
        weights = np.exp(scores) / np.exp(scores).sum()
        mixed = sum(w * (x[j] @ value[:, head]) for w, j in zip(weights, seen, strict=True))
        expected[row, i] += mixed @ output[head]
    helpers.assert_close(helpers.leaves(layer(inputs)), [expected], LAYER_BOUND)


def test_odd_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"15.*3.*odd 5"):
        CausalSelfAttention(3, 20).build((None, None, 15))


def test_width_must_divide() -> None:
    with pytest.raises(ValueError, match=r"10.*3"):
        CausalSelfAttention(3, 20).build((None, None, 10))
