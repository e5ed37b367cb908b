"""Softmax attention over a sliding window, in time and memory linear in the length."""

from collections.abc import Callable
from typing import Any

from keras import ops

from elita_tf.ops.chunking import merge_chunks, product_dtype, split_chunks, state_dtype
from elita_tf.ops.loops import scan

# Queries in a chunk. Larger chunks compute more scores in vain, smaller ones make the loop long.
_CHUNK_SIZE = 128


def window_attention(
    query: Any, key: Any, value: Any, seen: Any, window: int, real: Any = None
) -> Any:
    """Attention of every position to the last few, its own included.

        y_t = sum_s softmax_s(query_t . key_s) value_s,        0 <= t - s < seen_t <= window

    Up to a window's length, the scores of all pairs are computed at once. For longer or unknown
    lengths, a loop computes the scores of one chunk of queries at a time, with the keys that these
    queries may see. The scores are not kept: the backward pass is a loop from the last chunk to the
    first, which computes them again.

    Args:
        query: (b, t, h, v), already scaled.
        key: (b, s, h, v). The last t of the s positions are those of the queries; those before
            are the past, at most `window` positions.
        value: (b, s, h, v).
        seen: int32 (b or 1, t), at most `window`: how many positions a query sees.
        window: the most that any query sees.
        real: optional boolean (b, s). The other positions take no part and do not count in t - s.
            Their outputs are finite and otherwise unspecified.

    Returns:
        (b, t, h, v).
    """
    dtype, narrow = product_dtype(query), query.dtype
    query, key, value = (ops.cast(x, dtype) for x in (query, key, value))
    return ops.cast(_attention(query, key, value, seen, window, real), narrow)


def _attention(query: Any, key: Any, value: Any, seen: Any, window: int, real: Any) -> Any:
    time = ops.shape(query)[1]
    if isinstance(time, int) and time <= window:
        return _whole(query, key, value, seen, real)
    if real is None:
        return _in_chunks(query, key, value, seen, window)
    # With the real positions side by side, t - s is their distance in the arrays too.
    order = real_last(real[:, ops.shape(key)[1] - time :])
    query, seen = take_rows(query, order), take_rows(seen, order)
    key, value = (take_rows(x, real_last(real)) for x in (key, value))
    outputs = _in_chunks(query, key, value, seen, window)
    return take_rows(outputs, ops.argsort(order, axis=1))


def real_last(real: Any) -> Any:
    """The order (b, t) that moves the real positions, a boolean (b, t), behind all others."""
    time = ops.shape(real)[1]
    index = ops.arange(time, dtype="int32")
    return ops.argsort(ops.where(real, index + time, index), axis=1)


def take_rows(x: Any, order: Any) -> Any:
    """(b, t, ...) with the positions of every row in an order (b, t) of its own."""
    batch, time, *features = ops.shape(x)
    # `take_along_axis` would take number by number, several times as slow.
    index = ops.cast(order, "int32") + time * ops.arange(batch, dtype="int32")[:, None]
    return ops.take(ops.reshape(x, (batch * time, *features)), index, axis=0)


def _whole(query: Any, key: Any, value: Any, seen: Any, real: Any) -> Any:
    if real is None:
        place = ops.arange(ops.shape(key)[1], dtype="int32")[None]
    else:
        place = ops.cumsum(ops.cast(real, "int32"), axis=1)
    distance = place[:, -query.shape[1] :, None] - place[:, None, :]
    visible = (distance >= 0) & (distance < seen[:, :, None])
    if real is not None:
        visible &= real[:, None, :]
    return ops.dot_product_attention(query, key, value, mask=visible[:, None], scale=1.0)


def _in_chunks(query: Any, key: Any, value: Any, seen: Any, window: int) -> Any:
    time = ops.shape(query)[1]
    size = _CHUNK_SIZE
    if isinstance(time, int):
        size = min(time, size)
    elif ops.is_tensor(time):  # TensorFlow's unknown length; JAX's, a symbol, has no minimum
        size = ops.minimum(time, size)
    query, seen = (ops.moveaxis(split_chunks(x, size), 1, 0) for x in (query, seen[:, :, None]))
    # A whole window before the first query, and a key for every query of the last chunk.
    missing = window - (ops.shape(key)[1] - time)
    filling = ops.shape(query)[0] * size - time
    pairs = ops.pad(ops.stack([key, value]), [[0, 0]] * 2 + [[missing, filling]] + [[0, 0]] * 2)
    outputs = _attend(seen, window)(query, ops.swapaxes(pairs, 2, 3))
    return merge_chunks(ops.moveaxis(outputs, 0, 1), time)


def _attend(seen: Any, window: int) -> Callable[[Any, Any], Any]:
    """The function from query (n, b, h, c, v) and pairs (2, b, h, s, v) to outputs (n, b, h, c, v).

    Pairs are the keys and the values, and `seen` is (n, b or 1, 1, c).
    """
    num_chunks, size = ops.shape(seen)[0], ops.shape(seen)[3]
    # The distances from the queries of a chunk to the keys of the window before it and of the chunk
    # itself. A key after the query gets the distance `window`, which no query sees.
    places = ops.arange(window + size, dtype="int32")
    distance = window + places[:size, None] - places
    distance = ops.where(distance < 0, window, distance)

    @ops.custom_gradient
    def attend(query: Any, pairs: Any) -> Any:
        sizes = (*ops.shape(pairs)[:3], window + size, pairs.shape[4])

        def chunk(index: Any, query: Any = query, pairs: Any = pairs) -> tuple[Any, ...]:
            zero = ops.zeros_like(index)  # JAX wants indices of one dtype
            key, value = ops.unstack(
                ops.slice(pairs, (zero, zero, zero, index * size, zero), sizes), 2
            )
            # A softmax over no position would be NaN, so a masked query sees one position.
            reach = ops.maximum(ops.take(seen, index, axis=0), 1)
            return distance < reach[..., None], ops.take(query, index, axis=0), key, value

        # Without a graph, TensorFlow would keep what it may have to differentiate: all the scores.
        # The backward pass takes the tensors themselves, for it may be differentiated once more.
        constants = ops.stop_gradient(query), ops.stop_gradient(pairs)

        def forward(_: Any, index: Any) -> tuple[Any, Any]:
            outputs = _forward(*chunk(index, *constants))
            return outputs, outputs

        def grad(d_outputs: Any) -> tuple[Any, Any]:
            def backward(carry: Any, index: Any) -> tuple[Any, Any]:
                d_query, d_pairs = _backward(*chunk(index), ops.take(d_outputs, index, axis=0))
                # The carry is what later chunks give to the window before the next one.
                d_pairs += ops.pad(carry[0], [[0, 0]] * 3 + [[size, 0], [0, 0]])
                before, own = d_pairs[..., :window, :], d_pairs[..., window:, :]
                # `scan` stacks something for every part of the carry: zeros where the stack is
                # not needed.
                return (before, own, d_query), (start[0], own, d_query)

            like = pairs[..., :window, :], pairs[..., :size, :], query[0]
            start = tuple(ops.zeros_like(x) for x in like)
            (before, *_), (_, own, d_query) = scan(backward, start, num_chunks, reverse=True)
            own = ops.reshape(ops.moveaxis(own, 0, 3), (*sizes[:3], -1, sizes[4]))
            return d_query, ops.concatenate([before, own], axis=3)

        return scan(forward, ops.zeros_like(query[0]), num_chunks)[1], grad

    return attend


def _softmax(visible: Any, query: Any, key: Any) -> Any:
    scores = ops.cast(ops.einsum("bhcv,bhsv->bhcs", query, key), state_dtype(query))
    return ops.softmax(ops.where(visible, scores, -float("inf")), axis=-1)


def _forward(visible: Any, query: Any, key: Any, value: Any) -> Any:
    weights = ops.cast(_softmax(visible, query, key), value.dtype)
    return ops.einsum("bhcs,bhsv->bhcv", weights, value)


def _backward(visible: Any, query: Any, key: Any, value: Any, d_outputs: Any) -> tuple[Any, Any]:
    weights = _softmax(visible, query, key)
    d_weights = ops.cast(ops.einsum("bhcv,bhsv->bhcs", d_outputs, value), weights.dtype)
    d_scores = weights * (d_weights - ops.sum(weights * d_weights, axis=-1, keepdims=True))
    d_scores, weights = (ops.cast(x, query.dtype) for x in (d_scores, weights))
    d_query = ops.einsum("bhcs,bhsv->bhcv", d_scores, key)
    d_key = ops.einsum("bhcs,bhcv->bhsv", d_scores, query)
    d_value = ops.einsum("bhcs,bhcv->bhsv", weights, d_outputs)
    return d_query, ops.stack([d_key, d_value])
