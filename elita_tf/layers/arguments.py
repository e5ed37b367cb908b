"""Checks of layer arguments, inputs, masks and states; positions, and the way of a single one."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from keras import ops

from elita_tf.layers.segments import LEAF
from elita_tf.ops.arguments import (
    require_counts,
    require_positive,
    require_segment_ids,
    require_shapes,
    segment_axes,
)
from elita_tf.ops.running import running_maximum
from elita_tf.ops.segments import segment_starts


def reject_unknown(owner: str, received: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError that names every unknown argument and the known one nearest to it.

    Args:
        owner: the class that received the arguments, for the message.
        received: the names of the arguments, such as `kwargs`.
        known: the names that the class takes.

    Example:

    >>> reject_unknown("Dog", {"nane": "Rex"}, ["name", "age"])
    Traceback (most recent call last):
        ...
    ValueError: Dog has no argument `nane` (did you mean `name`?). It takes: age, name.
    """
    known = sorted(known)
    unknown = [name for name in received if name not in known]
    if not unknown:
        return
    nearest = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    hints = [
        f"`{name}`" + (f" (did you mean `{near[0]}`?)" if near else "")
        for name, near in nearest.items()
    ]
    raise ValueError(f"{owner} has no argument {', '.join(hints)}. It takes: {', '.join(known)}.")


def require_sizes(layer: str, **sizes: Any) -> None:
    """`require_positive` of the sizes that are given; None stands for a default."""
    require_positive(layer, **{name: size for name, size in sizes.items() if size is not None})


def require_flag(layer: str, **flags: Any) -> None:
    """Raise a ValueError for a flag that is neither True nor False: "no" would count as True."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ValueError(f"`{name}` of {layer}: expected True or False, received {flag!r}.")


def input_width(layer: str, input_shape: Any, axes: str = "(batch, time, hidden)") -> int:
    """The last size of a shape that has as many axes as `axes`, or "..." before the last one."""
    rank = axes.count(",") + 1
    fits = len(input_shape) >= rank if "..." in axes else len(input_shape) == rank
    width = input_shape[-1] if fits else None
    if width is None:
        raise ValueError(
            f"{layer} takes inputs of the shape {axes}, and its weights have sizes that come from "
            f"the last one. Received the shape {tuple(input_shape)}; pass one of that form, its "
            "last size known."
        )
    return int(width)


def split_heads(layer: str, name: str, total_dim: int, num_heads: int) -> int:
    """`total_dim // num_heads`, or a ValueError that says how to make it divide."""
    if total_dim % num_heads:
        raise ValueError(
            f"{layer} splits {total_dim} features over {num_heads} heads, which does not divide. "
            f"Pass `{name}`, or a `num_heads` that divides {total_dim}."
        )
    return total_dim // num_heads


def require_built(layer: Any) -> None:
    """Raise a ValueError unless the layer has its weights, and so knows the sizes of its state."""
    if not layer.built:
        raise ValueError(
            f"The state of `{layer.name}` has sizes that come from its input width, and the layer "
            "is not built. Call it on an input, or call `build(input_shape)`, first."
        )


def require_batch_size(layer: Any, batch_size: Any) -> None:
    """Raise a ValueError unless the layer is built and `batch_size` counts rows."""
    require_built(layer)
    require_counts(f"the state of `{layer.name}`", batch_size=batch_size)


def require_state(layer: Any, state: Any, keys: set[str]) -> None:
    """Raise a ValueError unless `state` is the flat dict that the layer's state is.

    The leaf `segment_id` may be among its keys or not.
    """
    received = set(state) - {LEAF} if isinstance(state, dict) else type(state).__name__
    if received != keys:
        raise ValueError(
            f"The state of `{layer.name}` is a dict of {sorted(keys)}. Received: {received}. "
            "Start from `get_initial_state(batch_size)`."
        )


def require_call(
    layer: Any,
    width: int,
    inputs: Any,
    mask: Any,
    state: Any,
    state_axes: dict[str, str],
    segment_ids: Any = None,
) -> None:
    """Raise a ValueError unless inputs, mask, state and segments fit the layer and each other.

    Args:
        layer: for its name.
        width: of the inputs.
        inputs, mask, state, segment_ids: as of `call_with_state`; all but inputs may be None.
        state_axes: of every leaf of the state.
    """
    tensors = {"inputs": (inputs, f"batch time {width}")}
    if mask is not None:
        tensors["mask"] = mask, "batch time"
    if state is not None:
        require_state(layer, state, set(state_axes))
        axes_of = {**state_axes, LEAF: "batch"}
        tensors |= {f"state {name}": (leaf, axes_of[name]) for name, leaf in state.items()}
    require_shapes(f"`{layer.name}`", **tensors, **segment_axes(segment_ids))
    require_segment_ids(f"`{layer.name}`", segment_ids)


def positions_of(inputs: Any, offset: Any, mask: Any, segments: Any = None) -> tuple[Any, Any]:
    """The absolute position of each input, int32 (batch or 1, time), and the next one, (batch,).

    `offset` (batch,) counts the real positions before the inputs, or is None at the start of a
    sequence; masked positions advance nothing. Where the `number_segments` rise, it begins anew.
    """
    batch_size, time = ops.shape(inputs)[:2]
    start = ops.zeros((1,), "int32") if offset is None else ops.cast(offset, "int32")
    if segments is not None:
        return _positions_in_segments(start, mask, segments)
    if mask is None:
        positions = start[:, None] + ops.arange(time, dtype="int32")[None, :]
        return positions, ops.broadcast_to(start + time, (batch_size,))
    counts = ops.cumsum(ops.cast(mask, "int32"), axis=1)
    return start[:, None] + counts - 1, start + counts[:, -1]


def _positions_in_segments(start: Any, mask: Any, segments: Any) -> tuple[Any, Any]:
    real = ops.ones_like(segments) if mask is None else ops.cast(mask, "int32")
    counts = ops.cumsum(real, axis=1)
    # What was counted before the segment; the first one goes on from `start`.
    before = ops.where(segment_starts(segments), counts - real, -1)
    before = running_maximum(before, ops.full_like(before[:, 0], -1))
    counts = counts - ops.where(before < 0, -start[:, None], before)
    return counts - 1, counts[:, -1]


def one_position(step: Callable, inputs: list[Any], state: Any, **optional: Any) -> tuple[Any, Any]:
    """A `*_step` op on inputs (batch, 1, ...): no loop over time, which some exports refuse."""
    inputs = [ops.squeeze(x, axis=1) for x in inputs]
    optional = {k: ops.squeeze(x, axis=1) for k, x in optional.items() if x is not None}
    outputs, state = step(*inputs, state, **optional)
    return ops.expand_dims(outputs, axis=1), state
