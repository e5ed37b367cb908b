"""Tokens cut into slices whose intermediate products stay near the processor's caches."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from elita_tf.ops.loops import scan

# Elements of an intermediate product held at a time: 8 MiB of float32. A slice of fewer than 256
# tokens would leave the matrix products thin.
_ELEMENTS = 2**21
_MIN_TOKENS = 256


def largest_slice(elements_per_token: int) -> int:
    """The number of tokens in a slice, of as many tokens as you like."""
    return max(_MIN_TOKENS, _ELEMENTS // elements_per_token)


def slice_size(tokens: Any, elements_per_token: int) -> Any:
    """The number of tokens in a slice, at most `tokens`: a number, or a tensor if that is one."""
    largest = largest_slice(elements_per_token)
    if isinstance(tokens, int):
        return min(largest, max(tokens, 1))
    return ops.minimum(largest, ops.maximum(tokens, 1))


def map_slices(function: Callable[[Any], Any], num_slices: Any, like: Any) -> Any:
    """`function(index)` of every slice, stacked; `like` has the shape and dtype of one result.

    A single slice takes no loop, which some exports refuse.
    """
    if isinstance(num_slices, int) and num_slices == 1:
        return function(0)[None]

    def advance(_: Any, index: Any) -> tuple[Any, Any]:
        result = function(index)
        return result, result

    return scan(advance, like, num_slices)[1]


def accumulate_slices(
    function: Callable[[Any, Any], tuple[Sequence[Any], Any]],
    num_slices: Any,
    stacks: Sequence[Any],
    total: Any,
    reverse: bool = False,
) -> tuple[list[Any], Any]:
    """Stack some results of every slice and pass another on from slice to slice.

    Args:
        function: of the slice's index and the total so far; returns what to put into each of
            `stacks` at that index, and the new total.
        num_slices: number of slices.
        stacks: (slices, ...), to be written over.
        total: a tensor or a structure of tensors, for the first slice.
        reverse: whether to begin with the last slice.

    Returns:
        The filled `stacks` and the last `total`.
    """

    def advance(done: Any, stacks: Sequence[Any], total: Any) -> tuple[Any, Any, Any]:
        index = num_slices - 1 - done if reverse else done
        results, total = function(index, total)
        zero = ops.zeros_like(index)  # JAX wants indices of one dtype
        stacks = [
            ops.slice_update(stack, (index, *[zero] * (len(stack.shape) - 1)), result[None])
            for stack, result in zip(stacks, results, strict=True)
        ]
        return _next(done, [*results, *keras.tree.flatten(total)][-1]), stacks, total

    _, stacks, total = ops.while_loop(
        lambda done, *_: done < num_slices, advance, (0, list(stacks), total)
    )
    return stacks, total


def count_blocks(elements: int, slice_elements: int) -> int:
    """In how many blocks to add up what has so many elements.

    A block may hold as much as a slice's intermediate product.
    """
    return math.ceil(elements / max(_ELEMENTS, slice_elements))


def add_blocks(total: Any, term: Callable[[Any, int], Any], num_blocks: int) -> Any:
    """`total` (rows, width) plus a term made block by block: `term(row, number of rows)`."""
    rows, width = total.shape
    size = math.ceil(rows / num_blocks)

    def advance(index: Any, total: Any) -> tuple[Any, Any]:
        # The last block begins earlier, with rows that the one before has added already.
        start = ops.minimum(index * size, rows - size)
        block, zero = term(start, size), ops.zeros_like(start)
        is_new = start + ops.arange(size, dtype=start.dtype) >= index * size
        added = ops.where(is_new[:, None], block, ops.zeros_like(block))
        added = ops.slice(total, (start, zero), (size, width)) + added
        # The next index depends on the block alone. If it depended on the sum, XLA would copy the
        # whole total.
        return _next(index, block), ops.slice_update(total, (start, zero), added)

    return ops.while_loop(lambda index, _: index < num_blocks, advance, (0, total))[1]


def _next(index: Any, computed: Any) -> Any:
    """index + 1, once `computed` is there.

    Without the wait, TensorFlow would work on ten slices at a time, each with its own
    intermediate product. The comparison is never true, so what is added is 0.
    """
    computed = ops.cast(ops.reshape(computed, (-1,))[0], "float32")
    waited = ops.cast(computed < -float("inf"), "int32")
    return index + 1 + waited
