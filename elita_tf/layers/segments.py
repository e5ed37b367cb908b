"""Segments, masks and positions of a call, which may go on where the last call ended."""

from typing import Any

from keras import ops

from elita_tf.ops.running import running_maximum
from elita_tf.ops.segments import segment_starts

# The leaf of a state, int32 (batch,), that holds the segment id of the last real position.
SEGMENT_ID = "segment_id"
# Its value in a row that has read no real position with an id: the smallest int32.
_NO_SEGMENT = -(2**31)


def mask_of(inputs: Any, mask: Any) -> Any:
    """The mask, by default that of the inputs: Keras passes it to layers of a single tensor."""
    return getattr(inputs, "_keras_mask", None) if mask is None else mask


def require_state(layer: Any, state: Any, keys: set[str]) -> None:
    """Raise a ValueError unless `state` is a dict of these keys.

    The leaf `segment_id` may be among them or not.
    """
    received = set(state) - {SEGMENT_ID} if isinstance(state, dict) else type(state).__name__
    if received != keys:
        raise ValueError(
            f"The state of `{layer.name}` is a dict of {sorted(keys)}. Received: {received}. "
            "Start from `get_initial_state(batch_size)`."
        )


def number_segments(segment_ids: Any, mask: Any = None) -> Any:
    """Number the segments of each row, masked positions included.

    A masked position gets the number of the real one before it. A real position begins a segment
    where its id differs from that of the last real position.

    Args:
        segment_ids: integers (batch, time), or None.
        mask: optional boolean (batch, time).

    Returns:
        int32 (batch, time): 0 at first, and one more wherever a segment begins. None for None.

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
        own = {name: leaf for name, leaf in state.items() if name != SEGMENT_ID}
        previous = state.get(SEGMENT_ID)
    if segment_ids is None:
        return None, own, {} if previous is None else {SEGMENT_ID: previous}
    segment_ids = ops.cast(segment_ids, "int32")
    filled, real = segment_ids, None
    if mask is not None:
        mask = ops.cast(mask, "bool")
        filled, real = _fill_masked(segment_ids, mask), ops.any(mask, axis=1)
    last = filled[:, -1]
    previous = ops.cast(_NO_SEGMENT if previous is None else previous, "int32")
    if real is not None:
        last = ops.where(real, last, previous)
    if own is not None and SEGMENT_ID in state:
        known = ops.not_equal(previous, _NO_SEGMENT)
        restarted = ops.logical_and(known, ops.not_equal(filled[:, 0], previous))
        restarted = restarted if real is None else ops.logical_and(restarted, real)
        own = _restart(layer, own, restarted)
    return number_segments(filled), own, {SEGMENT_ID: last}


def positions_of(inputs: Any, offset: Any, mask: Any, segments: Any = None) -> tuple[Any, Any]:
    """The absolute position of each input, and the position of the one to come.

    Masked positions advance nothing: each has the position of the real one before it.

    Args:
        inputs: (batch, time, ...), of which only the sizes count.
        offset: int32 (batch,), the real positions before the inputs; None at the beginning.
        mask: optional boolean (batch, time).
        segments: optional `number_segments`; where they rise, positions count from 0 again.

    Returns:
        int32 (batch or 1, time), and int32 (batch,).

    Example:

    >>> import numpy as np
    >>> positions, to_come = positions_of(np.ones((1, 4)), None, np.array([[1, 1, 0, 1]]))
    >>> np.array(positions).tolist(), np.array(to_come).tolist()
    ([[0, 1, 1, 2]], [3])
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
