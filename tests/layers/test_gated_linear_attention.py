"""The GatedLinearAttention layer against its equation, written as loops over its weights."""

import itertools
import json
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.layers import GatedLinearAttention
from tests import helpers, oracles
from tests.helpers import BATCH, CHUNK, HEADS, KEY_DIM, LAYER_BOUND, TIME, VALUE_DIM, randomized

WIDTH, RANK = 10, 2
GATES = ("vector", "scalar", "fixed", None)
# The argument, and what three heads have of it.
HALF_LIVES, HALF_LIFE_OF_HEAD = (2.0, 50.0), np.array([2.0, 50.0, 65_536.0])
CASES = [*((gate, None) for gate in GATES), *((gate, HALF_LIVES) for gate in GATES if gate)]


def make_layer(**arguments: object) -> GatedLinearAttention:
    defaults = {"key_dim": KEY_DIM, "value_dim": VALUE_DIM, "gate_rank": RANK, "chunk_size": CHUNK}
    layer = GatedLinearAttention(HEADS, **{**defaults, "dtype": "float64", **arguments})
    layer.build((None, None, WIDTH))
    return randomized(layer)


def equation(layer: GatedLinearAttention, x: np.ndarray) -> np.ndarray:
    """S_t = diag(a_t) S_{t-1} + k_t v_t^T, head by head, for (time, width) inputs."""
    query, key, value, gate, gate_bias, output, scale, offset = helpers.leaves(
        [
            layer.query_projection.kernel,
            layer.key_projection.kernel,
            layer.value_projection.kernel,
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
            state = decay(layer, position, head) * state
            state = state + np.outer(position @ key[:, head], position @ value[:, head])
            y = KEY_DIM**-0.5 * (position @ query[:, head]) @ state
            y = (y - y.mean()) / np.sqrt(y.var() + 1e-5) * scale + offset
            logits = position @ gate[:, head] + gate_bias[head]
            outputs[t] += (logits * oracles.sigmoid(logits) * y) @ output[head]
    return outputs


def decay(layer: GatedLinearAttention, position: np.ndarray, head: int) -> np.ndarray:
    """What the state of a head is multiplied by, (KEY_DIM, 1)."""
    if layer.gate is None:
        return np.ones((KEY_DIM, 1))
    if layer.gate == "fixed":
        half_life = HALF_LIFE_OF_HEAD[head] if layer.half_lives else layer.gate_normalizer
        return np.full((KEY_DIM, 1), 0.5 ** (1.0 / half_life))
    weights = [layer.gate_down.kernel, layer.gate_up.kernel, layer.gate_bias]
    down, up, bias = helpers.leaves(weights)
    logits = np.zeros((KEY_DIM, 1))
    for feature in range(KEY_DIM):
        column = feature if layer.gate == "vector" else 0
        logits[feature] = position @ down @ up[:, head, column] + bias[head, column]
    return oracles.sigmoid(logits) ** (1.0 / layer.gate_normalizer)


def log_decays(layer: GatedLinearAttention, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What reaches the op of inputs of zero, which leave the gate logits at the bias."""
    received = []

    def op(query: Any, key: Any, value: Any, log_decay: Any, *_: Any, **__: Any) -> tuple:
        received.append(log_decay)
        return value, None

    module = "elita_tf.layers.gated_linear_attention.gated_linear_attention"
    monkeypatch.setattr(module, op)
    # Called as Keras does, which would cast the weights that it may.
    layer(np.zeros((BATCH, TIME, WIDTH)))
    assert tuple(received[-1].shape) == (BATCH, TIME, HEADS, KEY_DIM)
    return helpers.leaves(received[-1])[0]


@pytest.mark.parametrize("gate_normalizer", [16.0, 0.5])
@pytest.mark.parametrize(("gate", "half_lives"), CASES)
def test_equation(gate: str | None, half_lives: tuple | None, gate_normalizer: float) -> None:
    layer = make_layer(gate=gate, half_lives=half_lives, gate_normalizer=gate_normalizer)
    inputs = np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH))
    expected = np.stack([equation(layer, x) for x in inputs])
    helpers.assert_close(helpers.leaves(layer(inputs)), [expected], LAYER_BOUND)


@pytest.mark.parametrize("gate_normalizer", [16.0, 4.0])
def test_half_life_at_zero_bias_is_the_gate_normalizer(gate_normalizer: float) -> None:
    layer = make_layer(gate_normalizer=gate_normalizer)
    layer.gate_bias.assign(np.zeros((HEADS, KEY_DIM)))
    state = helpers.random_like(layer.get_initial_state(BATCH))[0]
    # Inputs of zero write nothing and leave the gate logits at the bias.
    silence = np.zeros((BATCH, int(gate_normalizer), WIDTH))
    final = layer.call_with_state(silence, {"state": state})[1]
    helpers.assert_close(helpers.leaves(final), [state / 2], LAYER_BOUND)


def test_a_fresh_layer_has_that_half_life() -> None:
    layer = GatedLinearAttention(HEADS, KEY_DIM, VALUE_DIM)
    layer.build((None, None, WIDTH))
    assert not helpers.leaves(layer.gate_bias)[0].any()


@pytest.mark.parametrize("gate", ["vector", "scalar", "fixed"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "mixed_bfloat16", "bfloat16"])
@pytest.mark.parametrize("half_lives", [None, HALF_LIVES])
def test_a_fresh_layer_has_its_half_lives(
    gate: str, dtype: str, half_lives: tuple | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = GatedLinearAttention(
        HEADS,
        KEY_DIM,
        VALUE_DIM,
        gate_normalizer=4.0,
        gate=gate,
        half_lives=half_lives,
        dtype=dtype,
    )
    layer.build((None, None, WIDTH))
    actual = log_decays(layer, monkeypatch)
    assert actual.dtype == ("float64" if dtype == "float64" else "float32")
    # With a bias in bfloat16 the longest would be 8e-3 off.
    bound = 1e-5 if actual.dtype == "float32" else LAYER_BOUND
    expected = HALF_LIFE_OF_HEAD if half_lives else np.full(HEADS, 4.0)
    for head, half_life in enumerate(expected):
        heads = -np.log(2.0) / actual[:, :, head]
        helpers.assert_close([heads], [np.full_like(heads, half_life)], bound)


def test_without_a_gate_nothing_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not log_decays(make_layer(gate=None), monkeypatch).any()


def test_gates_and_half_lives_change_the_outputs() -> None:
    inputs = np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH))
    outputs = []
    for gate, half_lives in CASES:
        # Every matrix is the same in all of them; the gate's are small.
        layer = GatedLinearAttention(
            HEADS,
            KEY_DIM,
            VALUE_DIM,
            gate=gate,
            half_lives=half_lives,
            kernel_initializer=keras.initializers.RandomNormal(seed=1),
            dtype="float64",
        )
        outputs.append(helpers.leaves(layer(inputs))[0])
    for first, second in itertools.combinations(outputs, 2):
        assert helpers.relative_error(first, second) > 1e-6


@pytest.mark.parametrize("gate", ["fixed", None])
def test_a_decay_that_is_not_read_has_no_weights(gate: str | None) -> None:
    names = ("gate_down", "gate_up", "gate_bias")
    kept = [w.shape for w in make_layer().weights if not any(name in w.path for name in names)]
    assert [weight.shape for weight in make_layer(gate=gate).weights] == kept


@pytest.mark.parametrize("gate", GATES)
def test_a_saved_configuration_comes_back(gate: str | None) -> None:
    half_lives = None if gate is None else HALF_LIVES
    layer = make_layer(gate=gate, half_lives=half_lives)
    copy = GatedLinearAttention.from_config(json.loads(json.dumps(layer.get_config())))
    assert (copy.gate, copy.half_lives) == (gate, half_lives)
    assert copy.get_config() == layer.get_config()
    copy.build((None, None, WIDTH))
    copy.set_weights(layer.get_weights())
    inputs = np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH))
    helpers.assert_close(helpers.leaves(copy(inputs)), helpers.leaves(layer(inputs)), 0.0)


@helpers.tensorflow_only
@pytest.mark.parametrize("gate", GATES)
def test_a_graph_of_unknown_batch_and_time(gate: str | None) -> None:
    import tensorflow as tf

    layer = make_layer(gate=gate)
    traced = tf.function(layer, input_signature=[tf.TensorSpec([None, None, WIDTH], "float64")])
    for batch, time in ((BATCH, TIME), (1, 1)):
        inputs = np.random.default_rng(3).standard_normal((batch, time, WIDTH))
        helpers.assert_close(helpers.leaves(traced(inputs)), helpers.leaves(layer(inputs)), 1e-12)


@pytest.mark.parametrize("gate", ["Vector", "", "none", 1, True, ["vector"]])
def test_an_unknown_gate_is_named(gate: Any) -> None:
    with pytest.raises(ValueError) as error:
        GatedLinearAttention(HEADS, gate=gate)
    for part in ("`gate` of GatedLinearAttention", "'scalar', 'fixed', None", repr(gate)):
        assert part in str(error.value)


@pytest.mark.parametrize("half_lives", [3.0, (3.0,), (0.0, 3.0), (1.0, float("nan")), "ab"])
def test_half_lives_are_checked(half_lives: Any) -> None:
    with pytest.raises(ValueError) as error:
        GatedLinearAttention(HEADS, half_lives=half_lives)
    assert "`half_lives` of GatedLinearAttention" in str(error.value)
    assert repr(half_lives) in str(error.value)


def test_half_lives_without_a_gate_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`half_lives`.*no effect.*\(2.0, 50.0\).*\"fixed\""):
        GatedLinearAttention(HEADS, gate=None, half_lives=HALF_LIVES)


def test_an_infinite_gate_normalizer_is_refused() -> None:
    with pytest.raises(ValueError, match="`gate_normalizer`.*finite.*inf"):
        GatedLinearAttention(HEADS, gate_normalizer=float("inf"))


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
