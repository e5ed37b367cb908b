"""Segments: documents packed one after the other into a row, which do not see one another.

A segment begins where `segment_ids` differ from the position before. The first position of a call
continues the segment of the initial state, which may be empty.
"""

from typing import Any

from keras import ops


def segment_starts(segment_ids: Any) -> Any:
    """Where a segment begins: boolean (batch, time) for integers (batch, time).

    Example:

    >>> import numpy as np
    >>> np.array(segment_starts(np.array([[7, 7, 3, 3, 3, 7]]))).astype(int).tolist()
    [[0, 0, 1, 0, 0, 1]]
    """
    before = ops.concatenate([segment_ids[:, :1], segment_ids[:, :-1]], axis=1)
    return ops.not_equal(segment_ids, before)
