"""What `segment_ids` mean for a layer: with masked positions, and from one call to the next."""

from typing import Any

from keras import ops

from elita_tf.ops.running import running_maximum
from elita_tf.ops.segments import segment_starts

# The leaf of a state, int32 (batch,), that names the segment of the last real position.
LEAF = "segment_id"


def mask_of(inputs: Any, mask: Any) -> Any:
    """The mask, by default that of the inputs: Keras passes it to layers of a single tensor."""
    return getattr(inputs, "_keras_mask", None) if mask is None else mask


def number_segments(segment_ids: Any, mask: Any = None) -> Any:
    """`segment_ids` that mean the same without the mask; None for none.

    Masked positions take no part: a real position is compared with the last real one before it.

    Args:
        segment_ids: integers (batch, time), or None.
        mask: optional boolean (batch, time).

    Returns:
        int32 (batch, time): 0 from the first position on, and one more from every first real
        position of a segment on.

    Example:

    >>> import numpy as np
    >>> ids, mask = np.array([[0, 5, 5, 0, 5, 6]]), np.array([[0, 1, 1, 0, 1, 1]])
    >>> np.array(number_segments(ids, mask)).tolist()
    [[0, 0, 0, 0, 0, 1]]
    """
    if segment_ids is None:
        return None
    if mask is not None:
        segment_ids = _fill_masked(segment_ids, ops.cast(mask, "bool"))
    return ops.cumsum(ops.cast(segment_starts(segment_ids), "int32"), axis=1)


def follow_segments(
    layer: Any, state: dict[str, Any] | None, mask: Any, segment_ids: Any
) -> tuple[Any, dict[str, Any] | None, dict[str, Any]]:
    """The segments of a call that goes on from a state.

    Args:
        layer: has `get_initial_state`.
        state: of the layer, or None at the beginning; with the leaf `segment_id` if the calls
            before had segments. A first real position of another segment starts from the empty
            state.
        mask: optional boolean (batch, time).
        segment_ids: integers (batch, time), or None, which goes on with the segment.

    Returns:
        `number_segments`; the state to start from, without `segment_id`; and the new state's
        `segment_id`, in a dict that is empty when there is none.
    """
    previous, own = None, state
    if state is not None:
        own = {name: leaf for name, leaf in state.items() if name != LEAF}
        previous = state.get(LEAF)
    if segment_ids is None:
        return None, own, {} if previous is None else {LEAF: previous}
    segment_ids = ops.cast(segment_ids, "int32")
    filled, real = segment_ids, None
    if mask is not None:
        mask = ops.cast(mask, "bool")
        filled, real = _fill_masked(segment_ids, mask), ops.any(mask, axis=1)
    last = filled[:, -1]
    if own is not None and previous is not None:
        previous = ops.cast(previous, "int32")
        restarted = ops.not_equal(filled[:, 0], previous)
        if real is not None:
            restarted, last = ops.logical_and(restarted, real), ops.where(real, last, previous)
        own = _restart(layer, own, restarted)
    return number_segments(filled), own, {LEAF: last}


def _fill_masked(segment_ids: Any, mask: Any) -> Any:
    """The id of the last real position at masked ones; of the first one before that."""
    time = ops.shape(segment_ids)[1]
    first = ops.cast(ops.argmax(ops.cast(mask, "int32"), axis=1), "int32")
    index = ops.where(mask, ops.arange(time, dtype="int32")[None, :], 0)
    return ops.take_along_axis(segment_ids, running_maximum(index, first), axis=1)


def _restart(layer: Any, state: dict[str, Any], restarted: Any) -> dict[str, Any]:
    """The state, empty in the rows (batch,) that are restarted."""
    empty = layer.get_initial_state(1)

    def leaf(name: str) -> Any:
        rows = ops.reshape(restarted, (-1, *[1] * (len(empty[name].shape) - 1)))
        return ops.where(rows, empty[name], ops.cast(state[name], empty[name].dtype))

    return {name: leaf(name) if name in empty else state[name] for name in state}
