"""Linear projection and softmax cross-entropy in one, slice by slice over the tokens."""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from elita_tf.ops.arguments import agree, require_floating, require_shapes, static_shape
from elita_tf.ops.chunking import (
    merge_axis,
    product_dtype,
    split_axis,
    state_dtype,
    unpack_upstream,
)
from elita_tf.ops.slicing import (
    accumulate_slices,
    add_blocks,
    count_blocks,
    largest_slice,
    map_slices,
    slice_size,
)
from elita_tf.ops.symbolic import symbolic


@symbolic
def linear_cross_entropy(hidden: Any, kernel: Any, labels: Any, sample_weight: Any = None) -> Any:
    """Mean cross-entropy of softmax(hidden kernel^T), without the (tokens, vocabulary) logits.

        loss = sum_n w_n (log sum_j e^(hidden_n . kernel_j) - hidden_n . kernel_label_n) / sum_n w_n

    A slice's gradients are taken while its logits are at hand, so no logits are made twice.

    Args:
        hidden: (..., hidden).
        kernel: (vocabulary, hidden), such as a tied embedding.
        labels: (...) integers in [0, vocabulary).
        sample_weight: broadcastable to (...), by default all 1.

    Returns:
        A float32 scalar (float64 if `hidden` is), in nats; 0 if all weights are 0.

    Raises:
        ValueError: shapes that do not fit together, or an array that is not floating-point.

    Example:

    >>> import numpy as np
    >>> from elita_tf import ops
    >>> loss = ops.linear_cross_entropy(np.zeros((3, 2)), np.ones((4, 2)), np.array([0, 1, 3]))
    >>> round(float(loss), 4)  # log 4
    1.3863
    """
    _require("linear_cross_entropy", hidden, kernel, labels, sample_weight)
    dtype = state_dtype(hidden)
    leading = ops.shape(labels)
    weight = ops.ones(leading, dtype) if sample_weight is None else ops.cast(sample_weight, dtype)
    weight = ops.reshape(ops.broadcast_to(weight, leading), (-1,))
    hidden, kernel, labels = _flat(hidden, kernel, labels)
    total = ops.sum(weight)
    loss = _weighted_sum(labels)(hidden, kernel, weight)
    empty = total == 0
    return ops.where(empty, ops.zeros_like(loss), loss / ops.where(empty, 1.0, total))


@symbolic
def token_cross_entropy(hidden: Any, kernel: Any, labels: Any) -> Any:
    """The loss of every token, (...), in nats, for scoring; arguments as above."""
    _require("token_cross_entropy", hidden, kernel, labels)
    leading = ops.shape(labels)
    hidden, kernel, labels = _flat(hidden, kernel, labels)
    tokens = ops.shape(hidden)[0]
    size = slice_size(tokens, kernel.shape[0])
    rows, targets = split_axis(hidden, size, axis=0), split_axis(labels, size, axis=0)
    kernel = ops.cast(kernel, product_dtype(hidden))

    def losses(index: Any) -> Any:
        logits = _logits(ops.cast(ops.take(rows, index, axis=0), kernel.dtype), kernel)
        return ops.logsumexp(logits, axis=-1) - _at(logits, ops.take(targets, index, axis=0))

    stacked = map_slices(losses, ops.shape(rows)[0], ops.zeros((size,), state_dtype(hidden)))
    return ops.reshape(merge_axis(stacked, tokens, axis=0), leading)


def _require(owner: str, hidden: Any, kernel: Any, labels: Any, sample_weight: Any = None) -> None:
    """Check the arguments of the cross-entropies."""
    require_shapes(
        owner,
        hidden=(hidden, "... hidden"),
        kernel=(kernel, "vocabulary hidden"),
        labels=(labels, "..."),
    )
    require_floating(owner, hidden=hidden, kernel=kernel)
    weights, sizes = static_shape(sample_weight), static_shape(labels)
    if weights is None or sizes is None:
        return
    pairs = zip(reversed(weights), reversed(sizes), strict=False)
    if len(weights) > len(sizes) or not all(weight == 1 or agree(weight, n) for weight, n in pairs):
        raise ValueError(
            f"`sample_weight` of {owner} weighs the labels: expected a shape that broadcasts to "
            f"theirs, {sizes}, received {weights}. Give one weight per label, or per row with a "
            "last axis of 1."
        )


def _weighted_sum(labels: Any) -> Callable[[Any, Any, Any], Any]:
    """The function (hidden, kernel, weight) -> sum of weight times loss."""
    losses_and_gradients = _losses_and_gradients(labels)

    @ops.custom_gradient
    def weighted_sum(hidden: Any, kernel: Any, weight: Any) -> Any:
        losses, d_hidden, d_kernel = losses_and_gradients(hidden, kernel, weight)

        def grad(upstream: Any) -> tuple[Any, Any, Any]:
            return (
                ops.cast(upstream * d_hidden, hidden.dtype),
                ops.cast(upstream * d_kernel, kernel.dtype),
                upstream * losses,
            )

        return ops.sum(weight * losses), grad

    return weighted_sum


def _losses_and_gradients(labels: Any) -> Callable[[Any, Any, Any], Any]:
    """The function (hidden, kernel, weight) -> losses, and gradients of their weighted sum.

    The gradients are those with respect to `hidden` and `kernel`, in the dtype of `weight`.
    """

    @ops.custom_gradient
    def losses_and_gradients(hidden: Any, kernel: Any, weight: Any) -> Any:
        arguments = hidden, kernel, weight
        # TensorFlow would keep, or refuse, what is in the loop for the sake of its own derivatives.
        hidden, kernel, weight = map(ops.stop_gradient, arguments)
        tokens, dtype = ops.shape(hidden)[0], weight.dtype
        size = slice_size(tokens, kernel.shape[0])
        rows, targets, weights = (split_axis(x, size, axis=0) for x in (hidden, labels, weight))
        classes = ops.arange(kernel.shape[0], dtype=labels.dtype)
        largest = largest_slice(kernel.shape[0]) * kernel.shape[0]
        num_blocks = count_blocks(math.prod(kernel.shape), largest)
        kernel = ops.cast(kernel, product_dtype(hidden))
        # Others than weights of at most 1 could be too small or too large for products in float16.
        unit = None
        if keras.backend.standardize_dtype(kernel.dtype) == "float16":
            largest_weight = ops.max(ops.abs(weights))
            unit = ops.where(largest_weight > 0, largest_weight, ops.ones_like(largest_weight))
            weights = weights / unit

        def forward_backward(index: Any, d_kernel: Any) -> tuple[list[Any], Any]:
            row, target, scale = (ops.take(x, index, axis=0) for x in (rows, targets, weights))
            row = ops.cast(row, kernel.dtype)
            logits = _logits(row, kernel)
            maximum = ops.max(logits, axis=-1, keepdims=True)
            exponentials = ops.exp(logits - maximum)
            sums = ops.sum(exponentials, axis=-1)
            losses = ops.log(sums) + maximum[:, 0] - _at(logits, target)
            d_logits = exponentials * (scale / sums)[:, None]
            is_label = target[:, None] == classes[None, :]
            d_logits = ops.cast(ops.where(is_label, d_logits - scale[:, None], d_logits), row.dtype)
            d_row = ops.cast(ops.matmul(d_logits, kernel), dtype)
            return [losses, d_row], _add_products(d_kernel, row, d_logits, num_blocks)

        stacks = [ops.zeros_like(weights), ops.zeros(ops.shape(rows), dtype)]
        shape = kernel.shape if num_blocks > 1 else kernel.shape[::-1]
        (losses, d_rows), d_kernel = accumulate_slices(
            forward_backward, ops.shape(rows)[0], stacks, total=ops.zeros(shape, dtype)
        )
        losses, d_hidden = merge_axis(losses, tokens, axis=0), merge_axis(d_rows, tokens, axis=0)
        d_kernel = d_kernel if num_blocks > 1 else ops.transpose(d_kernel)
        if unit is not None:
            d_hidden, d_kernel = d_hidden * unit, d_kernel * unit

        def grad(*upstream: Any) -> tuple[Any, Any, Any]:
            return _second_gradients(*arguments, labels, *unpack_upstream(upstream))

        return (losses, d_hidden, d_kernel), grad

    return losses_and_gradients


def _second_gradients(
    hidden: Any, kernel: Any, weight: Any, labels: Any, u_losses: Any, u_hidden: Any, u_kernel: Any
) -> tuple[Any, Any, Any]:
    """Gradients of <u_losses, losses> + <u_hidden, d_hidden> + <u_kernel, d_kernel>.

    The last two terms are the rate at which the weighted sum changes where `hidden` and `kernel`
    move along their upstream gradients. `motion` is the rate at which the logits change then.
    """
    tokens, size = ops.shape(hidden)[0], slice_size(ops.shape(hidden)[0], kernel.shape[0])
    slices = [split_axis(x, size, axis=0) for x in (hidden, labels, weight, u_losses, u_hidden)]
    wide_kernel = ops.cast(kernel, weight.dtype)
    classes = ops.arange(kernel.shape[0], dtype=labels.dtype)

    def backward(index: Any, total: Any) -> tuple[list[Any], Any]:
        row, target, scale, u_loss, u_row = (ops.take(x, index, axis=0) for x in slices)
        row = ops.cast(row, weight.dtype)
        shares = ops.softmax(_logits(row, wide_kernel))
        surplus = shares - ops.cast(target[:, None] == classes[None, :], shares.dtype)
        motion = _logits(u_row, wide_kernel) + _logits(row, u_kernel)
        mean = ops.sum(shares * motion, axis=-1, keepdims=True)
        first = scale[:, None] * surplus
        second = scale[:, None] * shares * (motion - mean) + u_loss[:, None] * surplus
        d_row = ops.matmul(second, wide_kernel) + ops.matmul(first, u_kernel)
        d_scale = ops.sum(surplus * motion, axis=-1)
        total += ops.matmul(ops.transpose(second), row) + ops.matmul(ops.transpose(first), u_row)
        return [d_row, d_scale], total

    (d_rows, d_scales), d_kernel = accumulate_slices(
        backward,
        ops.shape(slices[0])[0],
        stacks=[ops.zeros_like(slices[4]), ops.zeros_like(slices[2])],
        total=ops.zeros_like(u_kernel),
    )
    d_hidden, d_weight = (merge_axis(x, tokens, axis=0) for x in (d_rows, d_scales))
    return ops.cast(d_hidden, hidden.dtype), ops.cast(d_kernel, kernel.dtype), d_weight


def _add_products(d_kernel: Any, row: Any, d_logits: Any, num_blocks: int) -> Any:
    """The kernel's gradient with a slice's added: transposed in one piece, or block by block.

    Only the small operand is transposed: to transpose the logits would be one more pass over them.
    A large kernel is added to block by block, which avoids a second array of its size.
    """
    transposed = ops.transpose(row)
    if num_blocks == 1:
        return d_kernel + ops.cast(ops.matmul(transposed, d_logits), d_kernel.dtype)

    def rows_of_kernel(start: Any, count: int) -> Any:
        columns = ops.slice(d_logits, (ops.zeros_like(start), start), (row.shape[0], count))
        return ops.cast(ops.transpose(ops.matmul(transposed, columns)), d_kernel.dtype)

    return add_blocks(d_kernel, rows_of_kernel, num_blocks)


def _flat(hidden: Any, kernel: Any, labels: Any) -> tuple[Any, Any, Any]:
    """(tokens, hidden), (vocabulary, hidden) in the same dtype, (tokens,)."""
    hidden = ops.convert_to_tensor(hidden)
    kernel = ops.cast(kernel, hidden.dtype)
    labels = ops.reshape(ops.cast(labels, "int32"), (-1,))
    return ops.reshape(hidden, (-1, kernel.shape[-1])), kernel, labels


def _logits(rows: Any, kernel: Any) -> Any:
    return ops.cast(ops.matmul(rows, ops.transpose(kernel)), state_dtype(rows))


def _at(logits: Any, labels: Any) -> Any:
    return ops.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
