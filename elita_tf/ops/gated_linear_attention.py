"""Gated linear attention (GLA): a matrix state per head with a decay for every key feature.

    S_t = diag(e^log_decay_t) S_{t-1} + key_t value_t^T          y_t = scale * query_t S_t

| here           | paper (Yang et al., ICML 2024, arXiv:2312.06635)     |
|----------------|------------------------------------------------------|
| log_decay      | log alpha_t, at most 0                               |
| state          | S_t, key_dim x value_dim                             |
| chunk_size     | C; the halving below replaces its secondary chunking |

The fast form follows one rule: an exponent is always a plain sum of log-decays over the positions
between a key and a query. A chunk is halved again and again; between a left half and the right half
beside it, the decay from a key to the border and that from the border to a query are both at most
1, so scores are plain matrix products at every size, and nothing overflows or cancels.
"""

from typing import Any

from keras import ops

from elita_tf.ops.chunking import (
    decayed_sums,
    fit_chunk_size,
    merge_chunks,
    split_chunks,
    state_dtype,
)

# e^-1000 is exactly 0 in float64 and float32; a finite floor keeps sums of log-decays free of NaN.
_LOG_ZERO = -1000.0


def gated_linear_attention_step(
    query: Any, key: Any, value: Any, log_decay: Any, state: Any, *, scale: float | None = None
) -> tuple[Any, Any]:
    """One position: as the recurrent form, without the time axis."""
    dtype = state_dtype(query, key, value, log_decay)
    outputs_dtype = value.dtype
    query, key, value, log_decay, state = (
        ops.cast(x, dtype) for x in (query, key, value, log_decay, state)
    )
    state = ops.exp(log_decay)[..., None] * state + key[..., None] * value[..., None, :]
    outputs = _scale(query, scale) * ops.einsum("bhk,bhkv->bhv", query, state)
    return ops.cast(outputs, outputs_dtype), state


def gated_linear_attention_recurrent(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    initial_state: Any = None,
    *,
    scale: float | None = None,
) -> tuple[Any, Any]:
    """The definition: `gated_linear_attention_step` in a loop over time."""
    initial_state = _initial_state(query, key, value, log_decay, initial_state)
    # Time first, so that a position is a row; outputs ride in the carry, as `ops.scan` stacks
    # only what has the shape of the carry.
    inputs = [ops.moveaxis(x, 1, 0) for x in (query, key, value, log_decay)]

    def advance(carry: Any, position: Any) -> tuple[Any, Any]:
        carry = gated_linear_attention_step(
            *(ops.take(x, position, axis=0) for x in inputs), carry[1], scale=scale
        )
        return carry, carry

    carry = (ops.zeros_like(inputs[2][0]), initial_state)
    (_, final_state), (outputs, _) = ops.scan(advance, carry, ops.arange(ops.shape(value)[1]))
    return ops.moveaxis(outputs, 0, 1), final_state


def gated_linear_attention(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    initial_state: Any = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
) -> tuple[Any, Any]:
    """Gated linear attention over a sequence, chunk by chunk, in time and memory linear in length.

    Args:
        query: (batch, time, heads, key_dim).
        key: (batch, time, heads, key_dim).
        value: (batch, time, heads, value_dim).
        log_decay: (batch, time, heads, key_dim), at most 0; -inf forgets all before the position.
        initial_state: (batch, heads, key_dim, value_dim), by default zeros.
        scale: factor of the outputs, by default key_dim**-0.5.
        chunk_size: positions per chunk, rounded up to a power of two. It changes speed and
            memory, not the result.

    Returns:
        outputs (batch, time, heads, value_dim) in the dtype of `value`, and the final state in
        float32 (float64 if any input is float64).

    Raises:
        ValueError: `chunk_size` below 1.

    Example:

    >>> import numpy as np
    >>> from elita_tf import ops
    >>> ones, half = np.ones((1, 3, 1, 1)), np.full((1, 3, 1, 1), np.log(0.5))
    >>> outputs, state = ops.gated_linear_attention(ones, ones, ones, half)
    >>> [float(y) for y in np.ravel(outputs)]
    [1.0, 1.5, 1.75]
    """
    time, outputs_dtype = ops.shape(value)[1], value.dtype
    chunk_size = fit_chunk_size(chunk_size, time)
    state = _initial_state(query, key, value, log_decay, initial_state)
    scale = _scale(query, scale)
    query, key, value, log_decay = (
        split_chunks(ops.cast(x, state.dtype), chunk_size) for x in (query, key, value, log_decay)
    )
    scores, to_query, to_end = _halving(query, key, ops.maximum(log_decay, _LOG_ZERO))
    starts, final_state = decayed_sums(
        decay=ops.exp(to_query[..., -1, :])[..., None],
        increments=ops.matmul(ops.swapaxes(key * ops.exp(to_end), -1, -2), value),
        initial=state,
    )
    outputs = ops.matmul(scores, value) + ops.matmul(query * ops.exp(to_query), starts)
    return ops.cast(merge_chunks(scale * outputs, time), outputs_dtype), final_state


def _halving(query: Any, key: Any, log_decay: Any) -> tuple[Any, Any, Any]:
    """Scores within each chunk and the two sums of log-decays, built up from single positions.

    Args:
        query, key, log_decay: (..., c, k), c a power of two.

    Returns:
        scores (..., c, c), lower triangular; to_query (..., c, k), the log-decay from the chunk's
        start to each position, itself included; to_end (..., c, k), from each position, itself
        excluded, to the chunk's end.
    """
    leading, (chunk_size, key_dim) = ops.shape(query)[:-2], query.shape[-2:]
    blocks = (*leading, chunk_size, 1, key_dim)
    to_query = ops.reshape(log_decay, blocks)
    to_end = ops.zeros_like(to_query)
    scores = ops.sum(ops.reshape(query * key, blocks), axis=-1, keepdims=True)
    size = 1
    while size < chunk_size:
        pairs = (*leading, chunk_size // (2 * size), 2, size)
        query_right = ops.reshape(query, (*pairs, key_dim))[..., 1, :, :]
        key_left = ops.reshape(key, (*pairs, key_dim))[..., 0, :, :]
        query_left, query_sum = _halves(to_query, (*pairs, key_dim))
        end_left, end_right = _halves(to_end, (*pairs, key_dim))
        scores_left, scores_right = _halves(scores, (*pairs, size))

        across = ops.matmul(
            query_right * ops.exp(query_sum), ops.swapaxes(key_left * ops.exp(end_left), -1, -2)
        )
        upper = ops.pad(scores_left, [[0, 0]] * (len(scores_left.shape) - 1) + [[0, size]])
        lower = ops.concatenate([across, scores_right], axis=-1)
        scores = ops.concatenate([upper, lower], axis=-2)
        to_end = ops.concatenate([end_left + query_sum[..., -1:, :], end_right], axis=-2)
        to_query = ops.concatenate([query_left, query_left[..., -1:, :] + query_sum], axis=-2)
        size *= 2
    return tuple(x[..., 0, :, :] for x in (scores, to_query, to_end))


def _halves(x: Any, shape: tuple[Any, ...]) -> tuple[Any, Any]:
    x = ops.reshape(x, shape)
    return x[..., 0, :, :], x[..., 1, :, :]


def _scale(query: Any, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _initial_state(query: Any, key: Any, value: Any, log_decay: Any, initial_state: Any) -> Any:
    dtype = state_dtype(query, key, value, log_decay)
    if initial_state is not None:
        return ops.cast(initial_state, dtype)
    batch_size, _, num_heads, value_dim = ops.shape(value)
    return ops.zeros((batch_size, num_heads, query.shape[-1], value_dim), dtype=dtype)
