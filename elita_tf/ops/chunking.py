"""Time cut into chunks: splitting and merging; and what all forms agree on."""

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
    """(b, t, h, ...) to (b, n, h, c, ...), the last chunk filled up with `padding`."""
    batch, time, heads, *features = ops.shape(x)
    num_chunks = (time + chunk_size - 1) // chunk_size
    widths = [[0, 0], [0, num_chunks * chunk_size - time]] + [[0, 0]] * (1 + len(features))
    x = ops.pad(x, widths, constant_values=padding)
    x = ops.reshape(x, (batch, num_chunks, chunk_size, heads, *features))
    return ops.swapaxes(x, 2, 3)


def merge_chunks(x: Any, time: Any) -> Any:
    """(b, n, h, c, ...) back to (b, t, h, ...), without the padding."""
    batch, num_chunks, heads, chunk_size, *features = ops.shape(x)
    return ops.reshape(ops.swapaxes(x, 2, 3), (batch, num_chunks * chunk_size, heads, *features))[
        :, :time
    ]


def unpack_upstream(upstream: tuple[Any, ...]) -> tuple[Any, ...]:
    """The upstream gradients of several outputs: TensorFlow passes them apart, JAX as one tuple."""
    return tuple(upstream[0]) if len(upstream) == 1 else upstream
