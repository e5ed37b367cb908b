"""The Attention2 layer against ELiTA's equation, written as loops over the layer's weights."""

import math
from typing import Any

import numpy as np
import pytest

from elita_tf.layers import Attention2
from tests import helpers
from tests.helpers import BATCH, HEADS, LAYER_BOUND, VALUE_DIM, randomized

WIDTH, LENGTH, POSITION_DIM = 10, 9, 5


def make_layer(use_query: bool = False, dtype: str = "float64", **options: Any) -> Attention2:
    options = {"context_length": LENGTH, **options}
    layer = Attention2(
        HEADS,
        value_dim=VALUE_DIM,
        position_dim=POSITION_DIM,
        use_query=use_query,
        dtype=dtype,
        **options,
    )
    layer.build((None, None, WIDTH))
    return randomized(layer)


def make_inputs(time: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((BATCH, time, WIDTH))


def position_logit(layer: Attention2, which: int, head: int, position: int) -> float:
    """p_m,i . c for m = `which` + 1, one feature at a time."""
    if layer.context_length is None:
        return 0.0
    frequency, phase, readout = helpers.leaves([layer.frequency, layer.phase, layer.readout])
    return sum(
        math.sin(position * frequency[which, head, p] / LENGTH + phase[which, head, p])
        * readout[head, p]
        for p in range(POSITION_DIM)
    )


def kept_share(layer: Attention2, head: int, x: np.ndarray) -> float:
    """e^log_decay at a position whose input is `x`: 1 / (1 + e^(w . x + b))."""
    if layer.decay is None:
        return 1.0
    logit = helpers.leaves([layer.decay_bias])[0][head]
    if layer.decay == "gated":
        logit += x @ helpers.leaves([layer.decay_projection.kernel])[0][:, head]
    return 1.0 / (1.0 + math.exp(logit))


def elita(layer: Attention2, x: np.ndarray) -> np.ndarray:
    """The published equation with explicit exponentials, for (time, width) inputs."""
    logits, values = helpers.leaves([layer.logit_projection.kernel, layer.value_projection.kernel])
    joined = np.zeros((len(x), HEADS, VALUE_DIM))
    for head in range(HEADS):
        for i in range(len(x)):
            own = math.exp(x[i] @ logits[:, head, 1])
            query = position_logit(layer, 1, head, i)
            if layer.use_query:
                query += x[i] @ logits[:, head, 2]
            numerator, denominator = own * (x[i] @ values[:, head]), own
            for j in range(i + 1):
                key = x[j] @ logits[:, head, 0] + position_logit(layer, 0, head, j)
                weight = math.exp(query + key)
                weight *= math.prod(kept_share(layer, head, each) for each in x[j + 1 : i + 1])
                numerator = numerator + weight * (x[j] @ values[:, head])
                denominator += weight
            joined[i, head] = numerator / denominator
    (output,) = helpers.leaves([layer.output_projection.kernel])
    return np.einsum("thv,hvd->td", joined, output)


@pytest.mark.parametrize("time", [LENGTH, 4, 2 * LENGTH], ids=["exactly n", "prefix", "beyond n"])
@pytest.mark.parametrize("use_query", [False, True])
def test_published_equation(use_query: bool, time: int) -> None:
    layer, inputs = make_layer(use_query), make_inputs(time)
    expected = np.stack([elita(layer, x) for x in inputs])
    helpers.assert_close(helpers.leaves(layer(inputs)), [expected], LAYER_BOUND)


@pytest.mark.long
@pytest.mark.parametrize("context_length", [None, LENGTH])
@pytest.mark.parametrize("decay", ["learned", "gated"])
def test_equation_with_a_decay(decay: str, context_length: int | None) -> None:
    layer = make_layer(True, decay=decay, context_length=context_length)
    inputs = make_inputs(2 * LENGTH)
    expected = np.stack([elita(layer, x) for x in inputs])
    helpers.assert_close(helpers.leaves(layer(inputs)), [expected], LAYER_BOUND)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed_bfloat16"])
@pytest.mark.parametrize("decay", ["learned", "gated"])
def test_decays_start_at_the_half_lives(decay: str, dtype: str) -> None:
    layer = Attention2(4, decay=decay, half_lives=(2.0, 32.0), dtype=dtype)
    layer.build((None, None, 12))
    assert layer.decay_bias.dtype == "float32"
    # Where only the first position adds anything, what is left of it halves every half-life.
    bias = helpers.leaves([layer.decay_bias])[0].astype("float64")
    received = math.log(2.0) / np.logaddexp(0.0, bias)
    np.testing.assert_allclose(received, [2.0, 8.0, 32.0, 65_536.0], rtol=1e-4)
    kernels = [] if decay == "learned" else helpers.leaves([layer.decay_projection.kernel])
    assert not any(kernel.any() for kernel in kernels)


def test_what_is_kept_halves_every_half_life() -> None:
    layer = Attention2(2, decay="gated", half_lives=(3.0, 9.0), dtype="float64")
    layer.build((None, None, 12))
    first, zeros = np.full((BATCH, 1, 12), 0.7), np.zeros((BATCH, 6, 12))
    state = layer.call_with_state(first, layer.get_initial_state(BATCH))[1]
    after = layer.call_with_state(zeros, state)[1]
    weights = [np.exp(x["max_logit"]) * x["denominator"] for x in map(numpy_leaves, (state, after))]
    # An input of zeros has a key logit of 0, and so adds what its own decays leave: 1, 1/2, ...
    added = sum(0.5 ** (i / np.array([3.0, 65_536.0])) for i in range(6))
    expected = weights[0] * 0.5 ** (6 / np.array([3.0, 65_536.0])) + added
    helpers.assert_close(weights[1], expected, LAYER_BOUND)


def numpy_leaves(state: dict) -> dict:
    return dict(zip(state, helpers.leaves(list(state.values())), strict=True))


def test_without_sines_there_are_no_positions() -> None:
    layer = make_layer(decay="gated", context_length=None)
    assert set(layer.get_initial_state(BATCH)) == {"max_logit", "numerator", "denominator"}
    with pytest.raises(ValueError, match="has no position bases"):
        layer.position_bases(3)
    with pytest.raises(ValueError, match="has no decays"):
        make_layer().log_decays(make_inputs())
    names = {weight.name for weight in layer.weights}
    assert not names & {"frequency", "phase", "readout"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": None}, "received None for both"),
        ({"decay": "leaned"}, "'learned' or 'gated', received 'leaned'"),
        ({"decay": True}, "received True"),
        ({"half_lives": (0.0, 4.0)}, "two numbers of positions above 0"),
        ({"half_lives": 4.0}, "received 4.0"),
    ],
)
def test_mistakes_with_decays_are_explained(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention2(HEADS, **{"context_length": LENGTH, **options})


def test_position_bases_by_hand() -> None:
    layer = make_layer()
    (bases,) = helpers.leaves(layer.position_bases(7))
    expected = np.empty((HEADS, 7, 7))
    for head, i, j in np.ndindex(expected.shape):
        query, key = position_logit(layer, 1, head, i), position_logit(layer, 0, head, j)
        expected[head, i, j] = query + key
    helpers.assert_close(bases, expected, LAYER_BOUND)


def test_positions_keep_their_precision_under_mixed_precision() -> None:
    exact, mixed = make_layer(dtype="float32"), make_layer(dtype="mixed_bfloat16")
    mixed.set_weights(exact.get_weights())
    bases = helpers.leaves([exact.position_bases(300), mixed.position_bases(300)])
    assert np.array_equal(*bases)


def test_position_is_absolute() -> None:
    layer, inputs = make_layer(), make_inputs()
    state = layer.get_initial_state(BATCH)
    later = {**state, "position": np.array([4, 6], "int32")}
    outputs, state = layer.call_with_state(inputs, later)
    assert helpers.leaves(state["position"])[0].tolist() == [4 + LENGTH, 6 + LENGTH]
    # Not the outputs of a fresh start, but those of a sequence whose first positions were dropped.
    padded = np.concatenate([np.zeros((BATCH, 6, WIDTH)), inputs], axis=1)
    dropped = layer.call_with_state(padded[:, :6], layer.get_initial_state(BATCH))[1]
    empty = {**layer.get_initial_state(BATCH), "position": dropped["position"]}
    expected = layer.call_with_state(padded[:, 6:], empty)[0]
    helpers.assert_close(helpers.leaves(outputs[1]), helpers.leaves(expected[1]), LAYER_BOUND)
    assert helpers.relative_error(*helpers.leaves([outputs[0], expected[0]])) > 1e-3


def test_default_sizes() -> None:
    layer = Attention2(num_heads=HEADS, context_length=LENGTH)
    layer.build((None, None, 12))
    assert tuple(layer.value_projection.kernel.shape) == (12, HEADS, 4)
    assert tuple(layer.frequency.shape) == (2, HEADS, 8)
    with pytest.raises(ValueError, match=r"10.*3"):
        Attention2(num_heads=3, context_length=LENGTH).build((None, None, 10))


def test_logit_weights_start_small() -> None:
    layer = Attention2(num_heads=HEADS, context_length=LENGTH)
    layer.build((None, None, 12))
    weights = [layer.logit_projection.kernel, layer.frequency, layer.phase, layer.readout]
    arrays = helpers.leaves(weights)
    assert all(0.03 < np.abs(array).max() <= 0.05 for array in arrays)
    assert not np.array_equal(arrays[1], arrays[2])
