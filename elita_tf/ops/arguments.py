"""Checks of what a caller can mistype: sizes, and the shapes and dtypes of arrays.

They look at static shapes only, so that a compiled function holds nothing of them; a size that is
not known agrees with every other.
"""

from typing import Any

import keras

# The axes of a tensor, by name and separated by spaces. A number is a fixed size, and a first
# "..." is any number of axes.
Axes = str

_SEQUENCE, STEP = "batch time heads", "batch heads"
_STATE_AXES = ("batch heads", "batch heads value_dim", "batch heads")


def require_positive(owner: str, **sizes: Any) -> None:
    """Raise a ValueError for a size that is no integer of at least 1."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"`{name}` of {owner} counts something: expected an integer of at least 1, "
                f"received {size!r}."
            )


def require_counts(owner: str, **sizes: Any) -> None:
    """`require_positive` of what has a value now: a tensor has one only when its graph runs."""
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
    """Raise a ValueError for an array of anything else than floating-point numbers."""
    for name, tensor in tensors.items():
        if not keras.backend.is_float_dtype(tensor.dtype):
            raise ValueError(
                f"`{name}` of {owner}: expected floating-point numbers, received {tensor.dtype}. "
                f'Cast it, for example with keras.ops.cast({name}, "float32").'
            )


def require_attention2(
    owner: str,
    logits: tuple[Any, Any, Any],
    value: Any,
    state: Any,
    log_decay: Any = None,
    segments: Any = None,
    axes: Axes = _SEQUENCE,
) -> None:
    """The arguments of the forms of `attention2`; `axes` are those of the logits.

    A step needs a state, the forms over a sequence have an empty one by default.
    """
    named = dict(zip(("key_logits", "query_logits", "self_logits"), logits, strict=True))
    if log_decay is not None:
        named["log_decay"] = log_decay
    tensors = {name: (tensor, axes) for name, tensor in named.items()}
    tensors["value"] = value, f"{axes} value_dim"
    if state is not None or axes == STEP:
        leaves = ("max_logit", "numerator", "denominator")
        if not isinstance(state, tuple) or len(state) != len(leaves):
            raise ValueError(
                f"The state of {owner}: expected an `Attention2State` of {', '.join(leaves)}, "
                f"received {type(state).__name__}. Take one that an op returned, or "
                "`attention2_empty_state`."
            )
        tensors |= dict(zip(leaves, zip(state, _STATE_AXES, strict=True), strict=True))
    require_shapes(owner, **tensors, **_segments(axes, segments))
    require_floating(owner, **named, value=value)
    _require_segments(owner, axes, segments)


def require_gated_linear_attention(
    owner: str,
    inputs: tuple[Any, Any, Any, Any],
    state: Any,
    scale: Any,
    axes: Axes = _SEQUENCE,
    chunk_size: Any = 1,
    segments: Any = None,
) -> None:
    """The arguments of the forms of `gated_linear_attention`; `axes` are all but the last.

    A step needs a state, the forms over a sequence have an empty one by default.
    """
    named = dict(zip(("query", "key", "value", "log_decay"), inputs, strict=True))
    tensors = {name: (tensor, f"{axes} key_dim") for name, tensor in named.items()}
    tensors["value"] = named["value"], f"{axes} value_dim"
    if state is not None or axes == STEP:
        tensors["state"] = state, "batch heads key_dim value_dim"
    require_shapes(owner, **tensors, **_segments(axes, segments))
    require_floating(owner, **named)
    _require_segments(owner, axes, segments)
    require_positive(owner, chunk_size=chunk_size)
    if scale is not None and not isinstance(scale, (int, float)) and not hasattr(scale, "dtype"):
        raise ValueError(
            f"`scale` of {owner} multiplies the outputs: expected a number, received {scale!r}."
        )


def _segments(axes: Axes, segments: Any) -> dict[str, tuple[Any, Axes]]:
    """`segment_ids` of a sequence, or the `segment_start` of a step, for `require_shapes`."""
    if segments is None:
        return {}
    return {"segment_start": (segments, "batch")} if axes == STEP else segment_axes(segments)


def _require_segments(owner: str, axes: Axes, segments: Any) -> None:
    if axes != STEP:
        require_segment_ids(owner, segments)
    elif segments is not None and keras.backend.standardize_dtype(segments.dtype) != "bool":
        raise ValueError(
            f"`segment_start` of {owner} says which rows begin a segment: expected booleans, "
            f"received {segments.dtype}. Compare the ids with those of the position before."
        )


def segment_axes(segment_ids: Any) -> dict[str, tuple[Any, Axes]]:
    """Optional `segment_ids` for `require_shapes`."""
    return {} if segment_ids is None else {"segment_ids": (segment_ids, "batch time")}


def require_segment_ids(owner: str, segment_ids: Any) -> None:
    """Raise a ValueError for `segment_ids` that are given and no integers."""
    if segment_ids is not None and not keras.backend.is_int_dtype(segment_ids.dtype):
        raise ValueError(
            f"`segment_ids` of {owner} name the document of every position: expected integers, "
            f'received {segment_ids.dtype}. Cast them with keras.ops.cast(segment_ids, "int32").'
        )


def require_cross_entropy(
    owner: str, hidden: Any, kernel: Any, labels: Any, sample_weight: Any = None
) -> None:
    """The arguments of the cross-entropies."""
    require_shapes(
        owner,
        hidden=(hidden, "... hidden"),
        kernel=(kernel, "vocabulary hidden"),
        labels=(labels, "..."),
    )
    require_floating(owner, hidden=hidden, kernel=kernel)
    weights, sizes = _static_shape(sample_weight), _static_shape(labels)
    if weights is None or sizes is None:
        return
    pairs = zip(reversed(weights), reversed(sizes), strict=False)
    if len(weights) > len(sizes) or not all(
        weight == 1 or _agree(weight, n) for weight, n in pairs
    ):
        raise ValueError(
            f"`sample_weight` of {owner} weighs the labels: expected a shape that broadcasts to "
            f"theirs, {sizes}, received {weights}. Give one weight per label, or per row with a "
            "last axis of 1."
        )


def _static_shape(tensor: Any) -> tuple[int | None, ...] | None:
    """The shape; () of what has none, and None where not even the rank is known."""
    shape = getattr(tensor, "shape", ())
    return None if getattr(shape, "rank", 0) is None else tuple(shape)


def _describe(tensor: Any) -> str:
    if not hasattr(tensor, "shape"):
        return f"of type {type(tensor).__name__}"
    shape = _static_shape(tensor)
    return "of unknown rank" if shape is None else str(shape)


def _mismatch(name: str, tensor: Any, axes: list[str], sizes: dict[str, tuple[Any, str]]) -> str:
    """What is wrong with a tensor's shape, given the sizes so far; notes its own."""
    shape = _static_shape(tensor)
    if not hasattr(tensor, "shape"):
        return f"`{name}` is no array"
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
        if size == 0 or not _agree(known, size):
            expected = f"that of `{first}` has {known}" if first else f"expected {known}"
            expected = "expected one at least" if size == 0 else expected
            return f"Axis {i} of `{name}` has {size} elements, {expected}"
        if known is None:
            sizes[axis] = size, name
    return ""


def _agree(first: Any, second: Any) -> bool:
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(_agree, first, second))
    return first is None or second is None or first == second
