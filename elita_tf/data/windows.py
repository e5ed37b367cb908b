"""Windows of token ids as tf.data datasets of `(x, y)`, where y is x one position later."""

import functools
from collections.abc import Callable

import numpy as np
import tensorflow as tf


def num_training_windows(token_ids: np.ndarray, context_length: int) -> int:
    """Number of disjoint windows of `context_length + 1` ids."""
    return len(token_ids) // (context_length + 1)


def training_batch(
    token_ids: np.ndarray, step: int, *, context_length: int, batch_size: int, seed: int
) -> np.ndarray:
    """The windows of one training step, as a pure function of (seed, step).

    An epoch takes every disjoint window once, in an order drawn from (seed, epoch); windows that
    fill no batch wait for the next epoch's order.

    Args:
        token_ids: ids, rank 1; may be memory-mapped.
        step: number of the step, from 0, over all epochs.
        context_length: length of x and y.
        batch_size: windows a step.
        seed: a non-negative integer.

    Returns:
        int32 `(batch_size, context_length + 1)`.

    Raises:
        ValueError: when the ids do not fill one batch.
    """
    num_windows = num_training_windows(token_ids, context_length)
    steps_per_epoch = num_windows // batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"{len(token_ids)} token ids give {num_windows} windows of {context_length + 1}, "
            f"fewer than batch_size={batch_size}. Lower batch_size or context_length."
        )
    epoch, position = divmod(step, steps_per_epoch)
    chosen = _epoch_order(seed, epoch, num_windows)[position * batch_size :][:batch_size]
    offsets = chosen[:, None] * (context_length + 1) + np.arange(context_length + 1)
    return token_ids[offsets].astype(np.int32)


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_windows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


def training_windows(
    token_ids: np.ndarray, *, context_length: int, batch_size: int, seed: int, start_step: int = 0
) -> tf.data.Dataset:
    """Endless training batches from `start_step` on: `training_batch` of 0, 1, 2, ...

    Args:
        token_ids: ids, rank 1; may be memory-mapped.
        context_length: length of x and y.
        batch_size: windows a step.
        seed: a non-negative integer.
        start_step: the first step; a run that was stopped goes on with the very same batches.

    Returns:
        A dataset of `({"token_ids": x}, y)`, both int32 `(batch_size, context_length)`.

    Raises:
        ValueError: when the ids do not fill one batch.

    Example:

    >>> ids = np.arange(100, dtype=np.uint16)
    >>> dataset = training_windows(ids, context_length=4, batch_size=2, seed=0)
    >>> x, y = next(iter(dataset))
    >>> bool(tf.reduce_all(y == x["token_ids"] + 1))
    True
    """
    batch = functools.partial(
        training_batch, token_ids, context_length=context_length, batch_size=batch_size, seed=seed
    )
    batch(start_step)

    def load(step: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        windows = tf.numpy_function(batch, [step], tf.int32, stateful=False)
        windows = tf.ensure_shape(windows, (batch_size, context_length + 1))
        return {"token_ids": windows[:, :-1]}, windows[:, 1:]

    return _dataset(load, start_step, tf.int64.max)


def evaluation_windows(
    token_ids: np.ndarray, *, context_length: int, batch_size: int
) -> tf.data.Dataset:
    """Every id but the first as a label exactly once, in order.

    A window starts at the last label of the window before. The last window may be short and the
    last batch may lack windows: what fills them up weighs 0.

    Args:
        token_ids: ids, rank 1; may be memory-mapped.
        context_length: length of x and y.
        batch_size: windows a batch.

    Returns:
        A dataset of `({"token_ids": x}, y, sample_weight)`: int32, int32 and float32, all
        `(batch_size, context_length)`.

    Raises:
        ValueError: for fewer than two ids.
    """
    num_labels = len(token_ids) - 1
    if num_labels < 1:
        raise ValueError(f"Expected at least two token ids; received {len(token_ids)}.")
    block = batch_size * context_length
    shape = (batch_size, context_length)

    def batch(step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        window = token_ids[step * block : (step + 1) * block + 1].astype(np.int32)
        filled = np.zeros(block + 1, np.int32)
        filled[: len(window)] = window
        weight = (np.arange(block) < len(window) - 1).astype(np.float32)
        return filled[:-1].reshape(shape), filled[1:].reshape(shape), weight.reshape(shape)

    def load(step: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor, tf.Tensor]:
        types = (tf.int32, tf.int32, tf.float32)
        arrays = tf.numpy_function(batch, [step], types, stateful=False)
        inputs, labels, weight = (tf.ensure_shape(array, shape) for array in arrays)
        return {"token_ids": inputs}, labels, weight

    return _dataset(load, 0, -(-num_labels // block))


def _dataset(load: Callable[..., tuple], start: int, stop: int) -> tf.data.Dataset:
    return tf.data.Dataset.range(start, stop).map(load).prefetch(tf.data.AUTOTUNE)
