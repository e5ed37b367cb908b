"""Softmax self-attention with rotary positions: the baseline, and a block of hybrids."""

from typing import Any

import keras
from keras import ops

from elita_tf.layers.arguments import split_heads
from elita_tf.layers.mixer import POSITION, SequenceMixer
from elita_tf.layers.projection import projection
from elita_tf.ops.arguments import require_positive
from elita_tf.ops.chunking import state_dtype
from elita_tf.ops.window_attention import real_last, take_rows, window_attention

# The base of the rotary wavelengths in RoFormer, as in most decoders since.
_ROTARY_BASE = 10_000.0


@keras.saving.register_keras_serializable(package="elita_tf")
class CausalSelfAttention(SequenceMixer):
    """Causal multi-head softmax attention with rotary positions (RoPE), over a sliding window.

        y_i = W_o sum_j softmax_j(rotate_i(q_i) . rotate_j(k_j) / sqrt(head_dim)) v_j,
        0 <= i - j < window_length

    Time and memory are quadratic in the length up to `window_length`, and linear beyond. The state
    holds the last `window_length` keys and values.

    Args:
        num_heads: number of heads; the head dimension, width over heads, must be even.
        window_length: how many positions a query sees, its own included.
        kernel_initializer: for all matrices.
        kernel_regularizer: for all matrices.

    Call arguments:
        inputs: (batch, time, hidden).
        mask: optional boolean (batch, time). A masked position takes no part and advances no
            position; its own output is finite and otherwise unspecified.
        segment_ids: optional integers (batch, time). Where they differ from the real position
            before, a segment begins: it sees nothing earlier, and its positions count from 0.

    Returns:
        (batch, time, hidden).

    Raises:
        ValueError: a size below 1, a width that `num_heads` does not divide, an odd head, an
            unknown argument, or a shape of inputs, mask, segments or state that does not fit.

    Example:

    >>> import numpy as np
    >>> from elita_tf import layers
    >>> layer = layers.CausalSelfAttention(num_heads=2, window_length=16)
    >>> tuple(layer(np.ones((1, 5, 8), "float32")).shape)
    (1, 5, 8)

    Source: Vaswani et al. 2017, arXiv:1706.03762; Su et al. 2021, arXiv:2104.09864 (RoPE).
    """

    def __init__(
        self,
        num_heads: int,
        window_length: int,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        require_positive("CausalSelfAttention", num_heads=num_heads, window_length=window_length)
        self.num_heads = num_heads
        self.window_length = window_length
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def create_weights(self, inputs_shape: tuple[int | None, ...]) -> None:
        hidden_dim = self.hidden_dim
        head_dim = split_heads("CausalSelfAttention", "num_heads", hidden_dim, self.num_heads)
        if head_dim % 2:
            raise ValueError(
                "Rotary positions turn pairs of features, and CausalSelfAttention received "
                f"{hidden_dim} features for {self.num_heads} heads, an odd {head_dim} per head. "
                "Choose a width or `num_heads` that makes it even."
            )
        self._head_dim = head_dim
        per_head = (None, self.num_heads, head_dim)
        self.query_projection = projection(self, "btd,dhv->bthv", per_head, "query")
        self.key_projection = projection(self, "btd,dhv->bthv", per_head, "key")
        self.value_projection = projection(self, "btd,dhv->bthv", per_head, "value")
        self.output_projection = projection(self, "bthv,hvd->btd", (None, hidden_dim), "output")
        for layer in (self.query_projection, self.key_projection, self.value_projection):
            layer.build(inputs_shape)
        self.output_projection.build((*inputs_shape[:-1], self.num_heads, head_dim))

    @property
    def state_dtype(self) -> str:
        """That of the layer, as keys and values are kept as they were computed."""
        return self.compute_dtype

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The newest keys and values, (window_length, heads, head_dim), and the position."""
        kept = (self.window_length, self.num_heads, self._head_dim)
        return {"key": kept, "value": kept, POSITION: ()}

    def make_terms(self, inputs: Any, positions: Any, mask: Any) -> dict[str, Any]:
        query = _rotate(self.query_projection(inputs), positions)
        return {
            # Scaled here, as Keras rounds a scale to float32 also for float64.
            "query": query * self._head_dim**-0.5,
            "key": _rotate(self.key_projection(inputs), positions),
            "value": self.value_projection(inputs),
            "positions": positions,
            "mask": mask,
        }

    def run_sequence(
        self, terms: dict[str, Any], state: dict[str, Any] | None, segment_ids: Any
    ) -> tuple[Any, dict[str, Any]]:
        # A position is the number of real ones before it in its segment, the state's included.
        seen = ops.minimum(terms["positions"] + 1, self.window_length)
        query, key, value, real = (terms[name] for name in ("query", "key", "value", "mask"))
        if state is not None:
            # The state is aligned to its end: the newest key is the last one.
            key = ops.concatenate([ops.cast(state["key"], key.dtype), key], axis=1)
            value = ops.concatenate([ops.cast(state["value"], value.dtype), value], axis=1)
            if real is not None:
                slots = ops.arange(-self.window_length, 0, dtype="int32")
                real = ops.concatenate([state[POSITION][:, None] + slots >= 0, real], axis=1)
        outputs = window_attention(query, key, value, seen, self.window_length, real)
        if state is None:
            return outputs, {}
        may_be_empty = real is not None or segment_ids is not None
        length = terms["positions"][:, -1] + 1 if may_be_empty else None
        return outputs, self._newest(key, value, real, length)

    def _newest(self, key: Any, value: Any, real: Any, length: Any) -> dict[str, Any]:
        """The last real keys and values; zeros before the first of a segment of such a length."""
        if real is not None:
            order = real_last(real)
            key, value = (take_rows(x, order) for x in (key, value))
        key, value = (x[:, -self.window_length :] for x in (key, value))
        if length is not None:
            slots = ops.arange(-self.window_length, 0, dtype="int32")
            empty = (length[:, None] + slots < 0)[:, :, None, None]
            key, value = (ops.where(empty, ops.zeros_like(x), x) for x in (key, value))
        return {"key": key, "value": value}

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "window_length": self.window_length,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }


def _rotate(x: Any, positions: Any) -> Any:
    """Turn the pairs (feature, feature + head_dim / 2) of (b, t, h, v) by position / wavelength."""
    half = x.shape[-1] // 2
    dtype = state_dtype(x)
    frequencies = _ROTARY_BASE ** (-ops.arange(half, dtype=dtype) / half)
    angles = ops.cast(positions, dtype)[..., None, None] * frequencies
    cosine, sine = ops.cast(ops.cos(angles), x.dtype), ops.cast(ops.sin(angles), x.dtype)
    first, second = x[..., :half], x[..., half:]
    return ops.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)
