"""Windows of token ids as tf.data datasets of `(x, y)`, where y is x one position later.

They are made by TensorFlow ops alone: a Python function in a prefetching thread can stop a process
from ending.
"""

from typing import Any

import numpy as np
import tensorflow as tf

_BATCHES_AHEAD = 2


def num_training_windows(token_ids: np.ndarray | tf.Tensor, context_length: int) -> int:
    """Number of disjoint windows of `context_length + 1` ids."""
    _require(token_ids, context_length=context_length)
    return len(token_ids) // (context_length + 1)


def training_batch(
    token_ids: np.ndarray | tf.Tensor,
    step: int | tf.Tensor,
    *,
    context_length: int,
    batch_size: int,
    seed: int,
) -> tf.Tensor:
    """The windows of one training step, as a pure function of (seed, step).

    An epoch takes every disjoint window once, in an order drawn from (seed, epoch); windows that
    do not fill a batch wait for the next epoch.

    Args:
        token_ids: ids, rank 1.
        step: number of the step, from 0, over all epochs.
        context_length: length of x and y.
        batch_size: windows a step.
        seed: a non-negative integer.

    Returns:
        int32 `(batch_size, context_length + 1)`.

    Raises:
        ValueError: when the ids do not fill one batch, for ids that are not integers of rank 1,
            and for a size below 1.
    """
    _require(token_ids, batch_size=batch_size)
    num_windows = num_training_windows(token_ids, context_length)
    if num_windows < batch_size:
        raise ValueError(
            f"{len(token_ids)} token ids give {num_windows} windows of {context_length + 1}, "
            f"fewer than batch_size={batch_size}. Lower batch_size or context_length."
        )
    chosen = training_window_indices(num_windows, step, batch_size=batch_size, seed=seed)
    offsets = chosen[:, None] * (context_length + 1) + tf.range(context_length + 1, dtype=tf.int64)
    return tf.cast(tf.gather(_as_tensor(token_ids), offsets), tf.int32)


def training_window_indices(
    num_windows: int, step: int | tf.Tensor, *, batch_size: int, seed: int
) -> tf.Tensor:
    """Which windows `training_batch` takes at a step.

    Args:
        num_windows: of the ids: see `num_training_windows`.
        step: number of the step, from 0, over all epochs.
        batch_size: windows a step, at most `num_windows`.
        seed: a non-negative integer.

    Returns:
        int64 `(batch_size,)`; window i begins at id i * (context_length + 1).

    Example:

    >>> training_window_indices(5, 3, batch_size=2, seed=0).shape
    TensorShape([2])
    """
    steps_per_epoch = num_windows // batch_size
    step = tf.cast(step, tf.int64)
    epoch, position = step // steps_per_epoch, step % steps_per_epoch
    return tf.random.experimental.index_shuffle(
        position * batch_size + tf.range(batch_size, dtype=tf.int64),
        seed=tf.stack([tf.constant(seed, tf.int64), epoch]),
        max_index=num_windows - 1,
    )


def training_windows(
    token_ids: np.ndarray, *, context_length: int, batch_size: int, seed: int, start_step: int = 0
) -> tf.data.Dataset:
    """Endless training batches from `start_step` on: `training_batch` of 0, 1, 2, ...

    Args:
        token_ids: ids, rank 1; a `np.memmap` stays memory-mapped.
        context_length: length of x and y.
        batch_size: windows a step.
        seed: a non-negative integer.
        start_step: the first step; a run that was stopped goes on with the very same batches.

    Returns:
        A dataset of `({"token_ids": x}, y)`, both int32 `(batch_size, context_length)`.

    Raises:
        ValueError: as `training_batch`; a negative `start_step`.

    Example:

    >>> ids = np.arange(100, dtype=np.uint16)
    >>> dataset = training_windows(ids, context_length=4, batch_size=2, seed=0)
    >>> x, y = next(iter(dataset))
    >>> bool(tf.reduce_all(y == x["token_ids"] + 1))
    True
    """
    _require(token_ids, start_step, context_length=context_length, batch_size=batch_size)
    ids = _as_tensor(token_ids)

    def batch(step: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        windows = training_batch(
            ids, step, context_length=context_length, batch_size=batch_size, seed=seed
        )
        return {"token_ids": windows[:, :-1]}, windows[:, 1:]

    return made_ahead(tf.data.Dataset.range(start_step, tf.int64.max).map(batch))


def stream_windows(
    token_ids: np.ndarray, *, context_length: int, batch_size: int, start_step: int = 0
) -> tf.data.Dataset:
    """Endless training batches whose rows go on where those of the batch before ended.

    Row r starts at the r-th of `batch_size` evenly spaced ids and walks on through all the text,
    which is a ring: in as many steps as one row needs for its share, every id is seen once. This is
    for models that carry their state from batch to batch.

    Args:
        token_ids: ids, rank 1; a `np.memmap` stays memory-mapped.
        context_length: length of x and y.
        batch_size: rows.
        start_step: the first step.

    Returns:
        A dataset of `({"token_ids": x}, y)`, both int32 `(batch_size, context_length)`.

    Raises:
        ValueError: for fewer ids than one batch has, for ids that are not integers of rank 1, a
            size below 1 and a negative `start_step`.

    Example:

    >>> ids = np.arange(100, dtype=np.uint16)
    >>> batches = iter(stream_windows(ids, context_length=4, batch_size=2))
    >>> [next(batches)[0]["token_ids"].numpy().tolist() for _ in range(2)]
    [[[0, 1, 2, 3], [50, 51, 52, 53]], [[4, 5, 6, 7], [54, 55, 56, 57]]]
    """
    _require(token_ids, start_step, context_length=context_length, batch_size=batch_size)
    num_ids, needed = len(token_ids), batch_size * (context_length + 1)
    if num_ids < needed:
        raise ValueError(
            f"{num_ids} token ids are fewer than the {needed} of {batch_size} windows of "
            f"{context_length + 1}. Lower batch_size or context_length."
        )
    ids = _as_tensor(token_ids)
    starts = tf.range(batch_size, dtype=tf.int64) * (num_ids // batch_size)

    def batch(step: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        offsets = step * context_length + tf.range(context_length + 1, dtype=tf.int64)
        windows = tf.cast(tf.gather(ids, (starts[:, None] + offsets) % num_ids), tf.int32)
        return {"token_ids": windows[:, :-1]}, windows[:, 1:]

    return made_ahead(tf.data.Dataset.range(start_step, tf.int64.max).map(batch))


def evaluation_windows(
    token_ids: np.ndarray, *, context_length: int, batch_size: int
) -> tf.data.Dataset:
    """Every id but the first as a label exactly once, in order.

    A window starts at the last label of the window before. The last window may be short and the
    last batch may lack windows: the positions that fill them up have weight 0.

    Args:
        token_ids: ids, rank 1; a `np.memmap` stays memory-mapped.
        context_length: length of x and y.
        batch_size: windows a batch.

    Returns:
        A dataset of `({"token_ids": x}, y, sample_weight)`: int32, int32 and float32, all
        `(batch_size, context_length)`.

    Raises:
        ValueError: for fewer than two ids, for ids that are not integers of rank 1, and for a size
            below 1.
    """
    _require(token_ids, context_length=context_length, batch_size=batch_size)
    num_labels = len(token_ids) - 1
    if num_labels < 1:
        raise ValueError(f"Expected at least two token ids; received {len(token_ids)}.")
    ids = _as_tensor(token_ids)
    block = batch_size * context_length
    shape = (batch_size, context_length)

    def batch(step: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor, tf.Tensor]:
        taken = tf.cast(ids[step * block : (step + 1) * block + 1], tf.int32)
        filled = tf.pad(taken, [[0, block + 1 - tf.size(taken)]])
        weight = tf.cast(tf.range(block) < tf.size(taken) - 1, tf.float32)
        inputs, labels = tf.reshape(filled[:-1], shape), tf.reshape(filled[1:], shape)
        return {"token_ids": inputs}, labels, tf.reshape(weight, shape)

    num_batches = -(-num_labels // block)
    return made_ahead(tf.data.Dataset.range(num_batches).map(batch))


def made_ahead(batches: tf.data.Dataset) -> tf.data.Dataset:
    """The same batches, made while the model computes.

    Without tf.data's autotuner. It would have nothing to tune, and its thread can miss the end of
    an iterator: then `fit` stands still when it has ended, for as long as it took, up to a minute.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.prefetch(_BATCHES_AHEAD).with_options(options)


def _require(token_ids: np.ndarray | tf.Tensor, start_step: int = 0, **sizes: int) -> None:
    """Raises ValueError for ids that are not integers of rank 1, and for a wrong step or size."""
    shape = getattr(token_ids, "shape", None)
    if shape is None or len(shape) != 1 or not tf.as_dtype(token_ids.dtype).is_integer:
        received = type(token_ids).__name__ if shape is None else f"{token_ids.dtype} {shape}"
        raise ValueError(
            f"`token_ids`: expected an array of integers of rank 1, received {received}. Pass what "
            "`encode_split` returns, or np.asarray(ids)."
        )
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"`{name}`: expected an integer of at least 1, received {size!r}.")
    if start_step < 0:
        raise ValueError(f"`start_step` counts from 0 on; received {start_step}.")


def _as_tensor(token_ids: np.ndarray | tf.Tensor) -> tf.Tensor:
    if tf.is_tensor(token_ids):
        return token_ids
    with tf.device("CPU:0"):
        is_mapped = isinstance(token_ids, np.memmap)
        return tf.constant(_ArrayLike(token_ids) if is_mapped else token_ids)


class _ArrayLike:
    """Hides that an array is NumPy's: TensorFlow copies NumPy's arrays and shares the others.

    The file of a large corpus then stays on the disk. Where TensorFlow cannot share the memory,
    for a reversed view for one, it copies; the ids are the same.
    """

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._array
