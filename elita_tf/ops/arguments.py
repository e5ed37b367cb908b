"""Checks that all ops and layers share: of sizes, and of the shapes and dtypes of arrays.

They look at static shapes only, so a compiled function contains none of their work. A size that is
not known agrees with every other size. What one op alone must check stands beside that op.
"""

from typing import Any

import keras

# The axes of a tensor, by name and separated by spaces. A number is a fixed size, and a first
# "..." is any number of axes.
Axes = str

# Of an op over a sequence, and of its step.
SEQUENCE, STEP = "batch time heads", "batch heads"


def require_positive(owner: str, **sizes: Any) -> None:
    """Raise a ValueError unless every size is an integer of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"`{name}` of {owner} counts something: expected an integer of at least 1, "
                f"received {size!r}."
            )


def require_counts(owner: str, **sizes: Any) -> None:
    """`require_positive`, but of numbers only: a tensor has its value when its graph runs."""
    require_positive(owner, **{n: size for n, size in sizes.items() if not hasattr(size, "dtype")})


def require_shapes(owner: str, **tensors: tuple[Any, Axes]) -> None:
    """Raise a ValueError unless the shapes of all tensors agree with the names of their axes.

    Args:
        owner: the function or layer that was called, for the message.
        **tensors: each a tensor and its axes; axes of one name have one size, and not 0.

    Example:

    >>> import numpy as np
    >>> require_shapes("f", x=(np.ones((2, 5)), "batch 4"))
    Traceback (most recent call last):
        ...
    ValueError: f received x (2, 5): expected x (batch, 4). Axis 1 of `x` has 5 elements, \
expected 4. Pass, reshape or transpose `x` accordingly.
    """
    sizes: dict[str, tuple[Any, str]] = {}
    for name, (tensor, axes) in tensors.items():
        problem = _mismatch(name, tensor, axes.split(), sizes)
        if problem:
            received = ", ".join(f"{key} {_describe(value)}" for key, (value, _) in tensors.items())
            expected = ", ".join(
                f"{key} ({', '.join(each.split())})" for key, (_, each) in tensors.items()
            )
            raise ValueError(
                f"{owner} received {received}: expected {expected}. {problem}. Pass, reshape or "
                f"transpose `{name}` accordingly."
            )


def require_floating(owner: str, **tensors: Any) -> None:
    """Raise a ValueError unless every array holds floating-point numbers."""
    for name, tensor in tensors.items():
        if not keras.backend.is_float_dtype(tensor.dtype):
            raise ValueError(
                f"`{name}` of {owner}: expected floating-point numbers, received {tensor.dtype}. "
                f'Cast it, for example with keras.ops.cast({name}, "float32").'
            )


def segments_of(axes: Axes, segments: Any) -> dict[str, tuple[Any, Axes]]:
    """The `segment_ids` of a sequence or the `segment_start` of a step, for `require_shapes`."""
    if segments is None:
        return {}
    return {"segment_start": (segments, "batch")} if axes == STEP else segment_axes(segments)


def require_segments(owner: str, axes: Axes, segments: Any) -> None:
    """Raise a ValueError unless `segment_ids` are integers, or a `segment_start` booleans."""
    if axes != STEP:
        require_segment_ids(owner, segments)
    elif segments is not None and keras.backend.standardize_dtype(segments.dtype) != "bool":
        raise ValueError(
            f"`segment_start` of {owner} says which rows begin a segment: expected booleans, "
            f"received {segments.dtype}. Compare the ids with those of the position before."
        )


def segment_axes(segment_ids: Any) -> dict[str, tuple[Any, Axes]]:
    """The optional `segment_ids` for `require_shapes`."""
    return {} if segment_ids is None else {"segment_ids": (segment_ids, "batch time")}


def require_segment_ids(owner: str, segment_ids: Any) -> None:
    """Raise a ValueError unless `segment_ids` are integers or None."""
    if segment_ids is not None and not keras.backend.is_int_dtype(segment_ids.dtype):
        raise ValueError(
            f"`segment_ids` of {owner} name the document of every position: expected integers, "
            f'received {segment_ids.dtype}. Cast them with keras.ops.cast(segment_ids, "int32").'
        )


def static_shape(tensor: Any) -> tuple[int | None, ...] | None:
    """The shape: () if the tensor has none, None if not even its rank is known."""
    shape = getattr(tensor, "shape", ())
    return None if getattr(shape, "rank", 0) is None else tuple(shape)


def _describe(tensor: Any) -> str:
    if not hasattr(tensor, "shape"):
        return f"of type {type(tensor).__name__}"
    shape = static_shape(tensor)
    return "of unknown rank" if shape is None else str(shape)


def _mismatch(name: str, tensor: Any, axes: list[str], sizes: dict[str, tuple[Any, str]]) -> str:
    """What is wrong with a tensor's shape, or ""; adds its sizes to the known `sizes`."""
    shape = static_shape(tensor)
    if not hasattr(tensor, "shape"):
        return f"`{name}` is not an array"
    if shape is None:
        return ""
    grouped: tuple[Any, ...] = shape
    if axes[0] == "...":
        # Leading axes are compared as one, and there may be none.
        count = max(len(shape) - len(axes) + 1, 0)
        grouped = (shape[:count], *shape[count:])
    if len(grouped) != len(axes):
        return f"`{name}` has {len(shape)} axes"
    for i, (axis, size) in enumerate(zip(axes, grouped, strict=True)):
        known, first = (int(axis), "") if axis.isdigit() else sizes.get(axis, (None, name))
        if size == 0 or not agree(known, size):
            expected = f"that of `{first}` has {known}" if first else f"expected {known}"
            expected = "expected one at least" if size == 0 else expected
            return f"Axis {i} of `{name}` has {size} elements, {expected}"
        if known is None:
            sizes[axis] = size, name
    return ""


def agree(first: Any, second: Any) -> bool:
    """Whether two static sizes can be equal; None is a size that is not known."""
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(agree, first, second))
    return first is None or second is None or first == second
