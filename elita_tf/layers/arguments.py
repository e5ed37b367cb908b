"""Checks of layer arguments, masks and positions, and the way of a single position."""

from collections.abc import Callable
from typing import Any

from keras import ops


def require_positive(layer: str, **sizes: Any) -> None:
    """Raise a ValueError for a size that is neither None nor a positive integer."""
    for name, size in sizes.items():
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(
                f"`{name}` of {layer} counts something: expected an integer of at least 1, "
                f"received {size!r}."
            )


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


def require_state(layer: Any, state: Any, keys: set[str]) -> None:
    """Raise a ValueError unless `state` is the flat dict that the layer's state is."""
    received = set(state) if isinstance(state, dict) else type(state).__name__
    if received != keys:
        raise ValueError(
            f"The state of `{layer.name}` is a dict of {sorted(keys)}. Received: {received}. "
            "Start from `get_initial_state(batch_size)`."
        )


def positions_of(inputs: Any, offset: Any, mask: Any) -> tuple[Any, Any]:
    """The absolute position of each input, int32 (batch or 1, time), and the next one, (batch,).

    `offset` (batch,) counts the real positions before the inputs, or is None at the start of a
    sequence; masked positions advance nothing.
    """
    batch_size, time = ops.shape(inputs)[:2]
    start = ops.zeros((1,), "int32") if offset is None else ops.cast(offset, "int32")
    if mask is None:
        positions = start[:, None] + ops.arange(time, dtype="int32")[None, :]
        return positions, ops.broadcast_to(start + time, (batch_size,))
    counts = ops.cumsum(ops.cast(mask, "int32"), axis=1)
    return start[:, None] + counts - 1, start + counts[:, -1]


def one_position(step: Callable, inputs: list[Any], state: Any) -> tuple[Any, Any]:
    """A `*_step` op on inputs (batch, 1, ...): no loop over time, which some exports refuse."""
    outputs, state = step(*(ops.squeeze(x, axis=1) for x in inputs), state)
    return ops.expand_dims(outputs, axis=1), state
