"""The GatedLinearAttention layer."""

import math
from typing import Any

import keras
from keras import ops

from elita_tf.layers.arguments import require_sizes, split_heads
from elita_tf.layers.decay import half_life_bias, require_half_lives, spread_half_lives
from elita_tf.layers.mixer import SequenceMixer
from elita_tf.layers.normalization import LayerNormalization
from elita_tf.layers.projection import projection
from elita_tf.ops import gated_linear_attention, gated_linear_attention_step
from elita_tf.ops.arguments import require_positive

# With fewer key features, most of a chunk's cost is its square of scores: short ones are faster.
_NARROW_KEY_DIM = 32
_CHUNK_SIZE, _NARROW_CHUNK_SIZE = 64, 16

# The gates that read the decay from the input, and those that do not.
_READ_GATES, _CONSTANT_GATES = ("vector", "scalar"), ("fixed", None)


@keras.saving.register_keras_serializable(package="elita_tf")
class GatedLinearAttention(SequenceMixer):
    """Gated linear attention with a low-rank gate and a Swish output gate (GLA).

    Per head, with q, k, v linear in x:

        S_t = diag(e^log_decay_t) S_{t-1} + k_t v_t^T          o_t = key_dim^-0.5 q_t S_t
        y_t = W_o (swish(x_t W_r + b_r) * norm(o_t)),          norm over each head's features

    and, by `gate`,

        "vector"   log_decay_t = log sigmoid(x_t W_1 W_2 + b) / gate_normalizer, per key feature
        "scalar"   log_decay_t = log sigmoid(x_t W_1 W_2 + b) / gate_normalizer, one number
        "fixed"    log_decay_t = -ln 2 / half-life, one number that is not trained
        None       log_decay_t = 0

    "vector" is the paper's model and its best: it reports a training perplexity of 14.77, against
    15.56 with "scalar", 16.55 with "fixed" and 23.21 with None, for 340M parameters and 7B
    tokens. The others are for comparison, and "fixed" and None have no gate weights.

    There is no positional encoding. At the initial gate bias and small weights, every head has the
    half-life that `half_lives` gives it. The gate bias and the log-decays are float32 under
    policies of lower precision too, which would change long half-lives.

    Where the paper, its first code and the fla library differ, this layer takes: LayerNorm per
    head with scale and offset (paper), a bias in the output gate (paper and first code), queries
    scaled by key_dim^-0.5 (fla; the norm that follows makes it a matter of epsilon), Glorot
    initialisation.

    Args:
        num_heads: number of heads.
        key_dim: features of a head's queries and keys; by default half the input width over
            `num_heads`.
        value_dim: features of a head's values; by default the input width over `num_heads`.
        gate_rank: rank of the gate's projection.
        gate_normalizer: divides the log of the gate; larger remembers longer.
        chunk_size: positions per chunk, a matter of speed and memory only; by default 64, or 16
            for heads of fewer than 32 key features.
        gate: what decides the decay: "vector", "scalar", "fixed" or None, as above.
        half_lives: the shortest and the longest half-life, in positions, that heads start with, or
            with "fixed" keep. They are geometric over the heads, and the last head's is 65,536. By
            default the half-life of every head is `gate_normalizer`.
        kernel_initializer: for all matrices.
        kernel_regularizer: for all matrices.

    Call arguments:
        inputs: (batch, time, hidden).
        mask: optional boolean (batch, time). A masked position leaves the state unchanged; its
            own output is finite and otherwise unspecified.
        segment_ids: optional integers (batch, time). Where they differ from the real position
            before, a segment begins: it sees nothing earlier.

    Returns:
        (batch, time, hidden).

    Raises:
        ValueError: a size below 1, a `gate_normalizer` or half-lives that are not finite numbers
            above 0, an unknown `gate` or argument, half-lives without a gate, a width that
            `num_heads` does not divide, or a shape of inputs, mask, segments or state that does
            not fit.

    Example:

    >>> import numpy as np
    >>> from elita_tf import layers
    >>> layer = layers.GatedLinearAttention(num_heads=2)
    >>> tuple(layer(np.ones((1, 5, 8), "float32")).shape)
    (1, 5, 8)

    Source: Yang et al., ICML 2024, arXiv:2312.06635, section 4.
    """

    masked_terms = {"key": 0.0, "log_decay": 0.0}

    def __init__(
        self,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        chunk_size: int | None = None,
        gate: str | None = "vector",
        half_lives: tuple[float, float] | None = None,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        name = "GatedLinearAttention"
        require_positive(name, num_heads=num_heads, gate_rank=gate_rank)
        require_sizes(name, key_dim=key_dim, value_dim=value_dim, chunk_size=chunk_size)
        _require_gate(gate, gate_normalizer, half_lives)
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.gate_rank = gate_rank
        self.gate_normalizer = gate_normalizer
        self.chunk_size = chunk_size
        self.gate = gate
        # A saved configuration holds a list.
        self.half_lives = None if half_lives is None else tuple(half_lives)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def create_weights(self, inputs_shape: tuple[int | None, ...]) -> None:
        name, heads, hidden_dim = "GatedLinearAttention", self.num_heads, self.hidden_dim
        value_dim = self.value_dim or split_heads(name, "value_dim", hidden_dim, heads)
        key_dim = self.key_dim or split_heads(name, "key_dim", hidden_dim, 2 * heads)
        self._state_shape = (heads, key_dim, value_dim)
        default = _NARROW_CHUNK_SIZE if key_dim < _NARROW_KEY_DIM else _CHUNK_SIZE
        self._positions_per_chunk = self.chunk_size or default
        per_key, per_value = (None, heads, key_dim), (None, heads, value_dim)
        self.query_projection = projection(self, "btd,dhk->bthk", per_key, "query")
        self.key_projection = projection(self, "btd,dhk->bthk", per_key, "key")
        self.value_projection = projection(self, "btd,dhv->bthv", per_value, "value")
        if self.gate in _READ_GATES:
            self._create_gate(inputs_shape, key_dim if self.gate == "vector" else 1)
        self.output_gate = projection(
            self, "btd,dhv->bthv", per_value, "output_gate", bias_axes="hv", activation="silu"
        )
        self.output_projection = projection(self, "bthv,hvd->btd", (None, hidden_dim), "output")
        # The op's results are sums of products of three terms, which float16 cannot hold.
        self.norm = LayerNormalization(
            epsilon=1e-5, dtype=self.dtype_policy, autocast=False, name="norm"
        )
        for layer in (
            self.query_projection,
            self.key_projection,
            self.value_projection,
            self.output_gate,
        ):
            layer.build(inputs_shape)
        self.norm.build((*inputs_shape[:-1], heads, value_dim))
        self.output_projection.build((*inputs_shape[:-1], heads, value_dim))

    def _create_gate(self, inputs_shape: tuple[int | None, ...], features: int) -> None:
        """The gate's weights; a scalar gate has one feature where a vector gate has key_dim."""
        heads, start = self.num_heads, 0.0
        self.gate_down = projection(self, "btd,dr->btr", (None, self.gate_rank), "gate_down")
        self.gate_up = projection(self, "btr,rhk->bthk", (None, heads, features), "gate_up")
        self.gate_down.build(inputs_shape)
        self.gate_up.build((*inputs_shape[:-1], self.gate_rank))
        if self.half_lives is not None:
            half_lives = spread_half_lives(self.half_lives, heads)
            # log sigmoid(b) is -softplus(-b).
            start = -half_life_bias(half_lives, self.gate_normalizer)[:, None]
        # Not a bias of `gate_up`, which has the compute dtype: at a half-life of 65,536 it is 8.7,
        # where bfloat16 has steps of 0.06, and the half-life would be up to 3 % off.
        self.gate_bias = self.add_weight(
            (heads, features),
            keras.initializers.Constant(start),
            dtype=self.state_dtype,
            autocast=False,
            name="gate_bias",
        )

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the one leaf `state`, S: (heads, key_dim, value_dim)."""
        return {"state": self._state_shape}

    def make_terms(self, inputs: Any, positions: Any, mask: Any) -> dict[str, Any]:
        key = self.key_projection(inputs)
        return {
            "query": self.query_projection(inputs),
            "key": key,
            # The op's results have the dtype of the values, and are normalised before they lose it.
            "value": ops.cast(self.value_projection(inputs), self.state_dtype),
            "log_decay": self._log_decay(inputs, key),
        }

    def run_step(self, terms: dict[str, Any], state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        outputs, final = gated_linear_attention_step(**terms, state=state["state"])
        return outputs, {"state": final}

    def run_sequence(
        self, terms: dict[str, Any], state: dict[str, Any] | None, segment_ids: Any
    ) -> tuple[Any, dict[str, Any]]:
        outputs, final = gated_linear_attention(
            **terms,
            initial_state=state and state["state"],
            chunk_size=self._positions_per_chunk,
            segment_ids=segment_ids,
        )
        return outputs, {"state": final}

    def make_outputs(self, inputs: Any, mixed: Any) -> Any:
        return self.output_projection(ops.multiply(self.output_gate(inputs), self.norm(mixed)))

    def _log_decay(self, inputs: Any, key: Any) -> Any:
        """The log-decays, of the shape of `key` and in the dtype of the state."""
        if self.gate in _CONSTANT_GATES:
            log_decay = ops.convert_to_tensor(self._constant_log_decay, self.state_dtype)
        else:
            logits = ops.cast(self.gate_up(self.gate_down(inputs)), self.state_dtype)
            gate_logits = logits + ops.cast(self.gate_bias, self.state_dtype)
            log_decay = ops.log_sigmoid(gate_logits) / self.gate_normalizer
        return log_decay if self.gate == "vector" else ops.broadcast_to(log_decay, ops.shape(key))

    @property
    def _constant_log_decay(self) -> Any:
        """The log-decay of all heads, or (heads, 1), where it is not read from the input."""
        if self.gate is None:
            return 0.0
        if self.half_lives is None:
            return -math.log(2.0) / self.gate_normalizer
        return -math.log(2.0) / spread_half_lives(self.half_lives, self.num_heads)[:, None]

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "gate_rank": self.gate_rank,
            "gate_normalizer": self.gate_normalizer,
            "chunk_size": self.chunk_size,
            "gate": self.gate,
            "half_lives": self.half_lives,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }


def _require_gate(gate: Any, gate_normalizer: Any, half_lives: Any) -> None:
    """Raise a ValueError unless the arguments of the gate are valid, alone and together."""
    name = "GatedLinearAttention"
    gates = (*_READ_GATES, *_CONSTANT_GATES)
    if not (gate is None or isinstance(gate, str)) or gate not in gates:
        raise ValueError(
            f"`gate` of {name} says what decides the decay: expected one of {gates}, received "
            f'{gate!r}. Leave it out for the gate of the paper, "vector".'
        )
    if not isinstance(gate_normalizer, (int, float)) or not 0 < gate_normalizer < math.inf:
        raise ValueError(
            f"`gate_normalizer` of {name} divides the log of the gate: expected a finite number "
            f"above 0, received {gate_normalizer!r}."
        )
    if half_lives is None:
        return
    require_half_lives(name, half_lives)
    if gate is None:
        raise ValueError(
            f"`half_lives` of {name} would have no effect, as without a gate nothing is forgotten: "
            f'expected None, received {half_lives!r}. Leave it out, or pass gate="fixed".'
        )
