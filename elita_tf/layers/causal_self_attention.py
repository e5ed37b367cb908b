"""Softmax self-attention with rotary positions: the baseline, and a block of hybrids."""

from typing import Any

import keras
from keras import ops

from elita_tf.layers.arguments import (
    input_width,
    positions_of,
    require_batch_size,
    require_built,
    require_call,
    require_state,
    split_heads,
)
from elita_tf.layers.projection import projection
from elita_tf.layers.segments import follow_segments, mask_of, number_segments
from elita_tf.ops.arguments import require_positive
from elita_tf.ops.chunking import state_dtype
from elita_tf.ops.window_attention import real_last, take_rows, window_attention

# The base of the rotary wavelengths in RoFormer, as in most decoders since.
_ROTARY_BASE = 10_000.0


@keras.saving.register_keras_serializable(package="elita_tf")
class CausalSelfAttention(keras.layers.Layer):
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
        ValueError: a size below 1, a width that `num_heads` does not divide, an odd head, or a
            shape of inputs, mask, segments or state that does not fit.

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
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        hidden_dim = self._hidden_dim = input_width("CausalSelfAttention", input_shape)
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
            layer.build(input_shape)
        self.output_projection.build((*input_shape[:-1], self.num_heads, head_dim))

    def call(self, inputs: Any, mask: Any = None, segment_ids: Any = None) -> Any:
        mask = mask_of(inputs, mask)
        require_call(self, self._hidden_dim, inputs, mask, None, {}, segment_ids)
        segments = number_segments(segment_ids, mask)
        query, key, value, positions, _ = self._project(inputs, None, mask, segments)
        real = None if mask is None else ops.cast(mask, "bool")
        return self._attend(query, key, value, positions, real)

    def call_with_state(
        self, inputs: Any, state: dict[str, Any], mask: Any = None, segment_ids: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """Continue from `state`: (outputs, new state); what `call` does, in pieces.

        With `segment_ids`, the new state also holds the last one as `segment_id`.
        """
        require_built(self)
        require_state(self, state, set(self._state_axes))
        require_call(self, self._hidden_dim, inputs, mask, state, self._state_axes, segment_ids)
        segments, state, kept = follow_segments(self, state, mask, segment_ids)
        query, key, value, positions, next_position = self._project(inputs, state, mask, segments)
        # The state is aligned to its end: the newest key is the last one.
        key = ops.concatenate([ops.cast(state["key"], key.dtype), key], axis=1)
        value = ops.concatenate([ops.cast(state["value"], value.dtype), value], axis=1)
        slots = ops.arange(-self.window_length, 0, dtype="int32")
        real = None
        if mask is not None:
            earlier = ops.cast(state["position"], "int32")[:, None] + slots >= 0
            real = ops.concatenate([earlier, ops.cast(mask, "bool")], axis=1)
        outputs = self._attend(query, key, value, positions, real)
        if mask is not None:
            order = real_last(real)
            key, value = (take_rows(x, order) for x in (key, value))
        key, value = (x[:, -self.window_length :] for x in (key, value))
        if mask is not None or segments is not None:
            # Slots before the first position of the segment are empty.
            empty = (next_position[:, None] + slots < 0)[:, :, None, None]
            key, value = (ops.where(empty, ops.zeros_like(x), x) for x in (key, value))
        return outputs, {"key": key, "value": value, "position": next_position, **kept}

    def get_initial_state(self, batch_size: int) -> dict[str, Any]:
        """The empty state: key and value (batch, window_length, heads, head_dim), position."""
        require_batch_size(self, batch_size)
        shape = (batch_size, self.window_length, self.num_heads, self._head_dim)
        return {
            "key": ops.zeros(shape, self.compute_dtype),
            "value": ops.zeros(shape, self.compute_dtype),
            "position": ops.zeros((batch_size,), "int32"),
        }

    @property
    def _state_axes(self) -> dict[str, str]:
        kept = f"batch {self.window_length} {self.num_heads} {self._head_dim}"
        return {"key": kept, "value": kept, "position": "batch"}

    def _project(
        self, inputs: Any, state: dict[str, Any] | None, mask: Any, segments: Any
    ) -> tuple[Any, ...]:
        positions, next_position = positions_of(inputs, state and state["position"], mask, segments)
        query = _rotate(self.query_projection(inputs), positions)
        key = _rotate(self.key_projection(inputs), positions)
        return query, key, self.value_projection(inputs), positions, next_position

    def _attend(self, query: Any, key: Any, value: Any, positions: Any, real: Any) -> Any:
        # A position is the number of real ones before it in its segment, the state's included.
        seen = ops.minimum(positions + 1, self.window_length)
        # Scaled here, as Keras rounds a scale to float32 also for float64.
        query = query * self._head_dim**-0.5
        outputs = window_attention(query, key, value, seen, self.window_length, real)
        return self.output_projection(outputs)

    @property
    def output_kernel(self) -> keras.Variable:
        """The kernel that makes the outputs: what a residual block scales or sets to zero."""
        return self.output_projection.kernel

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return input_shape

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
