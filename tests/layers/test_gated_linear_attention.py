"""The GatedLinearAttention layer against its equation, written as loops over its weights."""

from typing import Any

import numpy as np
import pytest

from elita_tf.layers import GatedLinearAttention
from tests import helpers, oracles
from tests.helpers import BATCH, CHUNK, HEADS, KEY_DIM, LAYER_BOUND, TIME, VALUE_DIM, randomized

WIDTH, RANK = 10, 2


def make_layer(**arguments: object) -> GatedLinearAttention:
    defaults = {"key_dim": KEY_DIM, "value_dim": VALUE_DIM, "gate_rank": RANK, "chunk_size": CHUNK}
    layer = GatedLinearAttention(HEADS, **{**defaults, "dtype": "float64", **arguments})
    layer.build((None, None, WIDTH))
    return randomized(layer)


def equation(layer: GatedLinearAttention, x: np.ndarray) -> np.ndarray:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, head by head, for (time, width) inputs."""
    query, key, value, down, up, bias, gate, gate_bias, output, scale, offset = helpers.leaves(
        [
            layer.query_projection.kernel,
            layer.key_projection.kernel,
            layer.value_projection.kernel,
            layer.gate_down.kernel,
            layer.gate_up.kernel,
            layer.gate_up.bias,
            layer.output_gate.kernel,
            layer.output_gate.bias,
            layer.output_projection.kernel,
            layer.norm.gamma,
            layer.norm.beta,
        ]
    )
    outputs = np.zeros((len(x), WIDTH))
    for head in range(HEADS):
        state = np.zeros((KEY_DIM, VALUE_DIM))
        for t, position in enumerate(x):
            gate_logits = position @ down @ up[:, head] + bias[head]
            decay = oracles.sigmoid(gate_logits) ** (1.0 / layer.gate_normalizer)
            state = decay[:, None] * state
            state = state + np.outer(position @ key[:, head], position @ value[:, head])
            y = KEY_DIM**-0.5 * (position @ query[:, head]) @ state
            y = (y - y.mean()) / np.sqrt(y.var() + 1e-5) * scale + offset
            logits = position @ gate[:, head] + gate_bias[head]
            outputs[t] += (logits * oracles.sigmoid(logits) * y) @ output[head]
    return outputs


@pytest.mark.parametrize("gate_normalizer", [16.0, 0.5])
def test_equation(gate_normalizer: float) -> None:
    layer = make_layer(gate_normalizer=gate_normalizer)
    inputs = np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH))
    expected = np.stack([equation(layer, x) for x in inputs])
    helpers.assert_close(helpers.leaves(layer(inputs)), [expected], LAYER_BOUND)


@pytest.mark.parametrize("gate_normalizer", [16.0, 4.0])
def test_half_life_at_zero_bias_is_the_gate_normalizer(gate_normalizer: float) -> None:
    layer = make_layer(gate_normalizer=gate_normalizer)
    layer.gate_up.bias.assign(np.zeros((HEADS, KEY_DIM)))
    state = helpers.random_like(layer.get_initial_state(BATCH))[0]
    # Inputs of zero write nothing and leave the gate logits at the bias.
    silence = np.zeros((BATCH, int(gate_normalizer), WIDTH))
    final = layer.call_with_state(silence, {"state": state})[1]
    helpers.assert_close(helpers.leaves(final), [state / 2], LAYER_BOUND)


def test_a_fresh_layer_has_that_half_life() -> None:
    layer = GatedLinearAttention(HEADS, KEY_DIM, VALUE_DIM)
    layer.build((None, None, WIDTH))
    assert not helpers.leaves(layer.gate_up.bias)[0].any()


def test_default_sizes() -> None:
    layer = GatedLinearAttention()
    layer.build((None, None, 24))
    assert tuple(layer.key_projection.kernel.shape) == (24, 4, 3)
    assert tuple(layer.value_projection.kernel.shape) == (24, 4, 6)
    assert tuple(layer.gate_down.kernel.shape) == (24, 16)
    for name, width in (("key_dim", 12), ("value_dim", 10)):
        with pytest.raises(ValueError, match=rf"{width}.*{name}"):
            GatedLinearAttention(num_heads=4).build((None, None, width))


def test_chunk_size_changes_no_result() -> None:
    inputs = np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH))
    small, large = make_layer(chunk_size=1), make_layer(chunk_size=64)
    helpers.assert_close(helpers.leaves(small(inputs)), helpers.leaves(large(inputs)), LAYER_BOUND)


@pytest.mark.parametrize(("key_dim", "expected"), [(31, 16), (32, 64)])
def test_narrow_heads_have_short_chunks(
    key_dim: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    received = []

    def op(
        query: Any, key: Any, value: Any, *rest: Any, chunk_size: int, **options: Any
    ) -> tuple[Any, Any]:
        received.append(chunk_size)
        return value, None

    module = "elita_tf.layers.gated_linear_attention.gated_linear_attention"
    monkeypatch.setattr(module, op)
    layer = GatedLinearAttention(HEADS, key_dim=key_dim, value_dim=VALUE_DIM)
    layer(np.ones((BATCH, TIME, WIDTH), "float32"))
    assert set(received) == {expected}
