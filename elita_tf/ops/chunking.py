"""Cutting an axis into pieces of one size and joining them again; and what all ops share."""

from typing import Any

import keras
from keras import ops


def state_dtype(*tensors: Any) -> str:
    """The dtype of states and sums: float64 if any input is float64, else float32."""
    dtypes = {keras.backend.standardize_dtype(x.dtype) for x in tensors}
    return "float64" if "float64" in dtypes else "float32"


def product_dtype(x: Any) -> str:
    """The dtype in which an op makes its own products of `x`, with what it gets from them.

    It is that of `x`, but at least float32 where there are CPUs alone: XLA has no products of
    narrower numbers on a CPU, so it would convert large intermediate results forth and back.
    """
    only_cpus = all(name.startswith("cpu") for name in keras.distribution.list_devices())
    return state_dtype(x) if only_cpus else keras.backend.standardize_dtype(x.dtype)


def fit_chunk_size(chunk_size: int, time: Any) -> int:
    """The power of two at or above `chunk_size`, no larger than a static `time` needs."""
    if chunk_size < 1:
        raise ValueError(
            f"`chunk_size` is a number of positions. Received {chunk_size}; pass 1 or more (16 to "
            "128 is fast)."
        )
    longest = min(chunk_size, time) if isinstance(time, int) else chunk_size
    return 1 << max(longest - 1, 0).bit_length()


def split_axis(x: Any, size: Any, axis: int, padding: float = 0.0) -> Any:
    """Cut one axis into pieces: (..., length, ...) to (..., pieces, size, ...).

    The last piece is filled up with `padding`. A length of 0 gives one piece of padding, as JAX
    has no loop over nothing, and TensorFlow cannot stack its results.

    Example:

    >>> import numpy as np
    >>> np.array(split_axis(np.array([1.0, 2.0, 3.0]), size=2, axis=0)).tolist()
    [[1.0, 2.0], [3.0, 0.0]]
    """
    shape = ops.shape(x)
    # In ONNX, -(-length // size) of an unknown length would be wrong.
    pieces = (shape[axis] + size - 1) // size
    if isinstance(pieces, int):
        pieces = max(pieces, 1)
    elif ops.is_tensor(pieces):  # unlike a size of JAX that is to come
        pieces = ops.maximum(pieces, 1)
    widths = [[0, 0] for _ in shape]
    widths[axis][1] = pieces * size - shape[axis]
    x = ops.pad(x, widths, constant_values=padding)
    return ops.reshape(x, (*shape[:axis], pieces, size, *shape[axis + 1 :]))


def merge_axis(x: Any, length: Any, axis: int) -> Any:
    """Undo `split_axis`: (..., pieces, size, ...) to (..., length, ...), without the padding."""
    shape = ops.shape(x)
    merged = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
    return ops.reshape(x, merged)[(slice(None),) * axis + (slice(length),)]


def split_chunks(x: Any, chunk_size: Any) -> Any:
    """(b, t, h, ...) to (b, n, h, c, ...), the last chunk filled up with zeros."""
    return ops.swapaxes(split_axis(x, chunk_size, axis=1), 2, 3)


def merge_chunks(x: Any, time: Any) -> Any:
    """(b, n, h, c, ...) back to (b, t, h, ...), without the padding."""
    return merge_axis(ops.swapaxes(x, 2, 3), time, axis=1)


def unpack_upstream(upstream: tuple[Any, ...]) -> tuple[Any, ...]:
    """The upstream gradients of several outputs: TensorFlow passes them apart, JAX as one tuple."""
    return tuple(upstream[0]) if len(upstream) == 1 else upstream
