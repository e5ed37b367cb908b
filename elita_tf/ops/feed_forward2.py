"""The bilinear core of FeedForward2 (ELiTA): an outer product of two factors against one kernel."""

from collections.abc import Callable
from functools import partial
from typing import Any

from keras import ops

from elita_tf.ops.arguments import require_floating, require_shapes
from elita_tf.ops.chunking import (
    merge_axis,
    product_dtype,
    split_axis,
    state_dtype,
    unpack_upstream,
)
from elita_tf.ops.slicing import accumulate_slices, map_slices, slice_size
from elita_tf.ops.symbolic import symbolic


@symbolic
def feed_forward2(first: Any, second: Any, kernel: Any) -> Any:
    """y_d = sum_{i,r} first_i second_r kernel_{i,r,d}, without bias.

    The (inner, rank) product of a token is never kept: forward and backward make it slice by
    slice of the tokens.

    Args:
        first: (..., inner), already activated.
        second: (..., rank), already activated.
        kernel: (inner, rank, hidden).

    Returns:
        (..., hidden).

    Raises:
        ValueError: shapes that do not fit together, or an array that is not floating-point.

    Example:

    >>> import numpy as np
    >>> from elita_tf import ops
    >>> y = ops.feed_forward2(np.array([[1.0, 2.0]]), np.array([[3.0]]), np.ones((2, 1, 1)))
    >>> float(y[0, 0])  # 1 * 3 + 2 * 3
    9.0

    Source: the elita-transformer repository, FeedForward2.
    """
    require_shapes(
        "feed_forward2",
        first=(first, "... inner"),
        second=(second, "... rank"),
        kernel=(kernel, "inner rank hidden"),
    )
    require_floating("feed_forward2", first=first, second=second, kernel=kernel)
    first, second, kernel = (ops.convert_to_tensor(x) for x in (first, second, kernel))
    inner, rank, hidden = kernel.shape
    outputs = _bilinear(
        ops.reshape(first, (-1, inner)),
        ops.reshape(second, (-1, rank)),
        ops.reshape(kernel, (inner * rank, hidden)),
    )
    return ops.reshape(outputs, (*ops.shape(first)[:-1], hidden))


@ops.custom_gradient
def _bilinear(first: Any, second: Any, matrix: Any) -> Any:
    tokens = ops.shape(first)[0]
    size, num_slices, _, product = _slices(first, second)
    wide = ops.cast(matrix, product_dtype(first))
    outputs = map_slices(
        lambda index: ops.cast(ops.matmul(product(index), wide), first.dtype),
        num_slices,
        like=ops.zeros((size, matrix.shape[-1]), first.dtype),
    )
    return merge_axis(outputs, tokens, axis=0), partial(_gradients, first, second, matrix)


@ops.custom_gradient
def _gradients(first: Any, second: Any, matrix: Any, d_outputs: Any) -> Any:
    arguments = first, second, matrix, d_outputs
    # TensorFlow would keep, or refuse, what is in the loop for the sake of its own derivatives.
    first, second, matrix, d_outputs = map(ops.stop_gradient, arguments)
    tokens, inner, rank = ops.shape(first)[0], first.shape[-1], second.shape[-1]
    size, num_slices, factors, product = _slices(first, second)
    d_slices = split_axis(d_outputs, size, axis=0)
    dtype, wide = first.dtype, ops.cast(matrix, product_dtype(first))

    def backward(index: Any, total: Any) -> tuple[list[Any], Any]:
        first, second = factors(index)
        d_slice = ops.cast(ops.take(d_slices, index, axis=0), wide.dtype)
        d_product = ops.reshape(ops.matmul(d_slice, ops.transpose(wide)), (-1, inner, rank))
        d_factors = ops.sum(d_product * second, axis=2), ops.sum(d_product * first, axis=1)
        # The transpose of the small operand: that of the product would be a pass over it.
        d_wide = ops.matmul(ops.transpose(d_slice), product(index))
        return [ops.cast(x, dtype) for x in d_factors], total + ops.cast(d_wide, total.dtype)

    shapes = [(num_slices, size, inner), (num_slices, size, rank)]
    d_factors, d_matrix = accumulate_slices(
        backward,
        num_slices,
        stacks=[ops.zeros(shape, first.dtype) for shape in shapes],
        total=ops.zeros(matrix.shape[::-1], state_dtype(matrix)),
    )

    def grad(*upstream: Any) -> tuple[Any, Any, Any, Any]:
        # The form <d_outputs, y> is linear in each of its four arguments. What is differentiated
        # here is the same form with one of the first three replaced by its upstream gradient, and
        # these are added up. So the gradients of any order are made slice by slice.
        first, second, matrix, d_outputs = arguments
        u_first, u_second, u_matrix = unpack_upstream(upstream)
        _, second_1, matrix_1 = _gradients(u_first, second, matrix, d_outputs)
        first_2, _, matrix_2 = _gradients(first, u_second, matrix, d_outputs)
        first_3, second_3, _ = _gradients(first, second, u_matrix, d_outputs)
        d_upstream = _bilinear(u_first, second, matrix)
        d_upstream += _bilinear(first, u_second, matrix) + _bilinear(first, second, u_matrix)
        return first_2 + first_3, second_1 + second_3, matrix_1 + matrix_2, d_upstream

    d_first, d_second = (merge_axis(x, tokens, axis=0) for x in d_factors)
    return (d_first, d_second, ops.cast(ops.transpose(d_matrix), matrix.dtype)), grad


def _slices(first: Any, second: Any) -> tuple[Any, Any, Callable, Callable]:
    """The tokens in slices: their size and number, and two functions of a slice's index.

    These give the factors, to be multiplied as (size, inner, 1) and (size, 1, rank), and their
    product, (size, inner * rank).
    """
    inner, rank, dtype = first.shape[-1], second.shape[-1], product_dtype(first)
    size = slice_size(ops.shape(first)[0], inner * rank)
    firsts, seconds = split_axis(first, size, axis=0), split_axis(second, size, axis=0)

    def factors(index: Any) -> tuple[Any, Any]:
        first, second = (ops.cast(ops.take(x, index, axis=0), dtype) for x in (firsts, seconds))
        return first[:, :, None], second[:, None, :]

    def product(index: Any) -> Any:
        first, second = factors(index)
        return ops.reshape(first * second, (-1, inner * rank))

    return size, ops.shape(firsts)[0], factors, product
