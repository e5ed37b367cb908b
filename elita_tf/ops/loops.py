"""A loop over positions, chunks or slices, which can be differentiated any number of times."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops


def scan(
    function: Callable[[Any, Any], tuple[Any, Any]],
    initial: Any,
    length: Any,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """`keras.ops.scan` over the indices from 0 to `length` - 1, or back.

    A loop of TensorFlow's that XLA is to differentiate must say how often it runs at most, which
    those of Keras do not.

    Args:
        function: (carry, index) -> (carry, result). Both have the structure, the shapes and the
            dtypes of `initial`.
        initial: the first carry.
        length: a number, or a tensor if it is unknown.
        reverse: whether to begin with the last index.

    Returns:
        The last carry, and the results stacked in the order of the indices.
    """
    if keras.backend.backend() != "tensorflow":
        indices = ops.arange(length, dtype="int32")
        return ops.scan(function, initial, indices, reverse=reverse)
    return _tensorflow_scan(function, initial, length, reverse)


def repeat(function: Callable[[Any, Any], list[Any]], initial: list[Any], times: int) -> list[Any]:
    """`keras.ops.fori_loop` from 0: (index, carry) -> carry, so many times."""
    if keras.backend.backend() != "tensorflow":
        return ops.fori_loop(0, times, function, initial)

    def advance(index: Any, carry: list[Any]) -> tuple[Any, list[Any]]:
        return index + 1, function(index, carry)

    return ops.while_loop(
        lambda index, _: index < times, advance, (0, initial), maximum_iterations=times
    )[1]


def _tensorflow_scan(function: Callable, initial: Any, length: Any, reverse: bool) -> Any:
    import tensorflow as tf

    def advance(done: Any, carry: list[Any], stacks: list[Any]) -> tuple[Any, list, list]:
        index = length - 1 - done if reverse else done
        carry, results = function(tf.nest.pack_sequence_as(initial, carry), index)
        written = zip(stacks, tf.nest.flatten(results), strict=True)
        return done + 1, tf.nest.flatten(carry), [stack.write(index, x) for stack, x in written]

    carry = [tf.convert_to_tensor(x) for x in tf.nest.flatten(initial)]
    stacks = [tf.TensorArray(x.dtype, size=length, element_shape=x.shape) for x in carry]
    _, carry, stacks = tf.while_loop(
        lambda done, *_: done < length,
        advance,
        (tf.constant(0), carry, stacks),
        maximum_iterations=length,
    )
    stacked = [stack.stack() for stack in stacks]
    return tuple(tf.nest.pack_sequence_as(initial, x) for x in (carry, stacked))
