"""The Attention2 layer against ELiTA's equation, written as loops over the layer's weights."""

import math

import numpy as np
import pytest

from elita_tf.layers import Attention2
from tests import helpers
from tests.helpers import BATCH, HEADS, LAYER_BOUND, VALUE_DIM, randomized

WIDTH, LENGTH, POSITION_DIM = 10, 9, 5


def make_layer(use_query: bool = False, dtype: str = "float64") -> Attention2:
    layer = Attention2(
        HEADS,
        context_length=LENGTH,
        value_dim=VALUE_DIM,
        position_dim=POSITION_DIM,
        use_query=use_query,
        dtype=dtype,
    )
    layer.build((None, None, WIDTH))
    return randomized(layer)


def make_inputs(time: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((BATCH, time, WIDTH))


def position_logit(layer: Attention2, which: int, head: int, position: int) -> float:
    """p_m,i . c for m = `which` + 1, one feature at a time."""
    frequency, phase, readout = helpers.leaves([layer.frequency, layer.phase, layer.readout])
    return sum(
        math.sin(position * frequency[which, head, p] / LENGTH + phase[which, head, p])
        * readout[head, p]
        for p in range(POSITION_DIM)
    )


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
