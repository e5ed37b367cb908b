"""Layers on any shapes, masks and splits against themselves, one position after the other."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elita_tf import layers
from tests import helpers
from tests.helpers import LAYER_BOUND, budget, jitted, randomized
from tests.mixers import MAIN, WIDTH

SEED = st.integers(0, 2**32 - 1)
FACTORIES = MAIN
BUILT: dict[tuple[str, str], Any] = {}


def layer_of(name: str, dtype: str) -> Any:
    """The layer of a name, made once, of the same weights in every dtype."""
    if (name, dtype) not in BUILT:
        layer = FACTORIES[name](dtype=dtype)
        layer.build((None, None, WIDTH))
        BUILT[name, dtype] = randomized(layer, scale=0.3)
    return BUILT[name, dtype]


@st.composite
def streams(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Inputs with what must not matter at masked positions, a mask, and the pieces' lengths."""
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    rng = np.random.default_rng(draw(SEED))
    mask = rng.random((batch, time)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
    inputs = scale * rng.standard_normal((batch, time, WIDTH))
    inputs[~mask] = draw(st.sampled_from([0.0, 1e3]))
    lengths, left = [], time
    while left:
        lengths.append(draw(st.integers(1, left)))
        left -= lengths[-1]
    return inputs, mask, lengths


@pytest.mark.parametrize("name", FACTORIES)
@budget(4, 40)
@given(stream=streams())
def test_any_pieces_under_any_mask_are_the_real_positions_alone(name: str, stream: tuple) -> None:
    inputs, mask, lengths = stream
    layer = layer_of(name, "float64")
    call_with_state = jitted(layer.call_with_state)
    state, pieces, start = layer.get_initial_state(len(inputs)), [], 0
    for length in lengths:
        piece = slice(start, start + length)
        outputs, state = call_with_state(inputs[:, piece], state, mask=mask[:, piece])
        pieces.append(helpers.leaves(outputs)[0])
        start += length
    outputs = np.concatenate(pieces, axis=1)
    whole = helpers.leaves(jitted(layer)(inputs, mask=mask))[0]
    helpers.assert_finite([outputs, whole])
    for row, kept in enumerate(mask):
        alone = layer.get_initial_state(1)
        final = {leaf: helpers.leaves(value)[0][row : row + 1] for leaf, value in state.items()}
        if kept.any():
            expected, alone = call_with_state(inputs[row : row + 1, kept], alone)
            expected = helpers.leaves(expected)[0][0]
            for result in (outputs, whole):
                helpers.assert_close([result[row, kept]], [expected], LAYER_BOUND)
        assert set(final) == set(alone)
        for leaf, value in alone.items():
            helpers.assert_close([final[leaf]], helpers.leaves(value), LAYER_BOUND)


@pytest.mark.parametrize("name", FACTORIES)
@budget(4, 40)
@given(stream=streams())
def test_float32_is_float64_rounded(name: str, stream: tuple) -> None:
    inputs, mask, _ = stream
    single, double = (
        helpers.leaves(jitted(layer_of(name, dtype))(inputs.astype(dtype), mask=mask))[0]
        for dtype in ("float32", "float64")
    )
    assert single.dtype == np.float32
    scale = np.abs(double[mask]).max(initial=1e-6)
    assert np.abs(single[mask] - double[mask]).max(initial=0.0) <= 1e-3 * scale


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


@budget(6, 100)
@given(
    leading=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)),
    seed=SEED,
)
def test_feed_forwards_are_their_equations(leading: list, sizes: tuple, seed: int) -> None:
    width, inner, rank = sizes
    x = np.random.default_rng(seed).standard_normal((*leading, width))
    layer = layers.FeedForward2(inner, rank, dtype="float64")
    layer.build(x.shape)
    weights = {weight.path.split("/", 1)[-1]: weight for weight in randomized(layer).weights}
    (kernel, bias, first, first_bias, second, second_bias) = (
        np.asarray(weights[name])
        for name in (
            "kernel",
            "bias",
            "first/kernel",
            "first/bias",
            "second/kernel",
            "second/bias",
        )
    )
    factors = silu(x @ first + first_bias), silu(x @ second + second_bias)
    expected = np.einsum("...i,...r,ird->...d", *factors, kernel) + bias
    helpers.assert_close(helpers.leaves(jitted(layer)(x)), [expected], LAYER_BOUND)
    gated = layers.GatedFeedForward(inner, dtype="float64")
    gated.build(x.shape)
    gate, value, output = randomized(gated).get_weights()
    expected = (silu(x @ gate) * (x @ value)) @ output
    helpers.assert_close(helpers.leaves(jitted(gated)(x)), [expected], LAYER_BOUND)
