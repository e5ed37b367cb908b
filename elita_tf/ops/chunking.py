"""Time cut into chunks: splitting, merging, and the scan from chunk to chunk."""

from typing import Any

import keras
from keras import ops


def state_dtype(*tensors: Any) -> str:
    """The dtype of states and sums: float64 if any input is float64, else float32."""
    dtypes = {keras.backend.standardize_dtype(x.dtype) for x in tensors}
    return "float64" if "float64" in dtypes else "float32"


def fit_chunk_size(chunk_size: int, time: Any) -> int:
    """The power of two at or above `chunk_size`, no larger than a static `time` needs."""
    if chunk_size < 1:
        raise ValueError(
            f"`chunk_size` is a number of positions. Received {chunk_size}; pass 1 or more (16 to "
            "128 is fast)."
        )
    longest = min(chunk_size, time) if isinstance(time, int) else chunk_size
    return 1 << max(longest - 1, 0).bit_length()


def split_chunks(x: Any, chunk_size: int, padding: float = 0.0) -> Any:
    """(b, t, h, ...) to (n, b, h, c, ...), the last chunk filled up with `padding`."""
    batch, time, heads, *features = ops.shape(x)
    num_chunks = (time + chunk_size - 1) // chunk_size
    widths = [[0, 0], [0, num_chunks * chunk_size - time]] + [[0, 0]] * (1 + len(features))
    x = ops.pad(x, widths, constant_values=padding)
    x = ops.reshape(x, (batch, num_chunks, chunk_size, heads, *features))
    return ops.transpose(x, (1, 0, 3, 2, *range(4, 4 + len(features))))


def merge_chunks(x: Any, time: Any) -> Any:
    """(n, b, h, c, ...) back to (b, t, h, ...), without the padding."""
    num_chunks, batch, heads, chunk_size, *features = ops.shape(x)
    x = ops.transpose(x, (1, 0, 3, 2, *range(4, 4 + len(features))))
    return ops.reshape(x, (batch, num_chunks * chunk_size, heads, *features))[:, :time]


def decayed_sums(decay: Any, increments: Any, initial: Any) -> tuple[Any, Any]:
    """Scan of `state = decay * state + increment` over chunks.

    Args:
        decay: (n, ..., 1), broadcast along the last axis of the state.
        increments: (n, ..., features).
        initial: (..., features), the state before the first chunk.

    Returns:
        The state before each chunk, (n, ..., features), and the state after the last.
    """
    return _decayed_sums(decay, increments, initial)


@ops.custom_gradient
def _decayed_sums(decay: Any, increments: Any, initial: Any) -> Any:
    chunks = ops.arange(ops.shape(increments)[0])

    def advance(state: Any, chunk: Any) -> tuple[Any, Any]:
        return ops.take(decay, chunk, axis=0) * state + ops.take(increments, chunk, axis=0), state

    final, before = ops.scan(advance, initial, chunks)

    def grad(*upstream: Any) -> tuple[Any, Any, Any]:
        d_before, d_final = unpack_upstream(upstream)

        def retreat(d_state: Any, chunk: Any) -> tuple[Any, Any]:
            d_earlier = ops.take(d_before, chunk, axis=0)
            return d_earlier + ops.take(decay, chunk, axis=0) * d_state, d_state

        d_initial, d_increments = ops.scan(retreat, d_final, chunks, reverse=True)
        d_decay = ops.sum(d_increments * before, axis=-1, keepdims=True)
        return d_decay, d_increments, d_initial

    return (before, final), grad


def unpack_upstream(upstream: tuple[Any, ...]) -> tuple[Any, ...]:
    """The upstream gradients of several outputs: TensorFlow passes them apart, JAX as one tuple."""
    return tuple(upstream[0]) if len(upstream) == 1 else upstream
