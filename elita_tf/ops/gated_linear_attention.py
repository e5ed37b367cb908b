"""Gated linear attention (GLA): a matrix state per head with a decay for every key feature.

    S_t = diag(e^log_decay_t) S_{t-1} + key_t value_t^T          y_t = scale * query_t S_t

| here           | paper (Yang et al., ICML 2024, arXiv:2312.06635)     |
|----------------|------------------------------------------------------|
| log_decay      | log alpha_t, at most 0                               |
| state          | S_t, key_dim x value_dim                             |
| chunk_size     | C; the pairs below replace its secondary chunking    |

The fast form follows one rule: a decay is a product of e^(plain sum of log-decays) over positions
between a key and a query. Blocks of a chunk are joined in pairs, from single positions up: queries
are decayed from their block's start, keys to their block's end, so the scores of a right block with
the keys of the left one are a plain matrix product at every size. No factor exceeds 1, so nothing
overflows or cancels, in the gradients either.
"""

from typing import Any

from keras import ops

from elita_tf.ops.arguments import (
    SEQUENCE,
    STEP,
    require_floating,
    require_positive,
    require_segments,
    require_shapes,
    segments_of,
)
from elita_tf.ops.chunking import fit_chunk_size, merge_chunks, split_chunks, state_dtype
from elita_tf.ops.loops import scan
from elita_tf.ops.running import running_sums
from elita_tf.ops.segments import segment_starts
from elita_tf.ops.symbolic import symbolic

# Blocks of up to so many rows are multiplied and summed: thousands of matrix products of so few
# rows cost more to start than to compute.
_FEW_ROWS = 4


@symbolic
def gated_linear_attention_step(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    state: Any,
    *,
    scale: float | None = None,
    segment_start: Any = None,
) -> tuple[Any, Any]:
    """One position: as the recurrent form, without the time axis.

    Rows where boolean `segment_start` (batch,) is true start from the empty state.
    """
    inputs = (query, key, value, log_decay)
    _require("gated_linear_attention_step", inputs, state, scale, STEP, segments=segment_start)
    if segment_start is not None:
        log_decay = _forget(log_decay, segment_start)
    dtype = state_dtype(query, key, value, log_decay)
    outputs_dtype = value.dtype
    query, key, value, log_decay, state = (
        ops.cast(x, dtype) for x in (query, key, value, log_decay, state)
    )
    state = ops.exp(log_decay)[..., None] * state + key[..., None] * value[..., None, :]
    outputs = _scale(query, scale) * ops.einsum("bhk,bhkv->bhv", query, state)
    return ops.cast(outputs, outputs_dtype), state


@symbolic
def gated_linear_attention_recurrent(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    initial_state: Any = None,
    *,
    scale: float | None = None,
    segment_ids: Any = None,
) -> tuple[Any, Any]:
    """The definition: `gated_linear_attention_step` in a loop over time."""
    inputs = (query, key, value, log_decay)
    _require("gated_linear_attention_recurrent", inputs, initial_state, scale, segments=segment_ids)
    if segment_ids is not None:
        log_decay = _forget(log_decay, segment_starts(segment_ids))
    initial_state = _initial_state(query, key, value, log_decay, initial_state)
    # Time first, so that a position is a row; outputs ride in the carry, as `scan` stacks only
    # what has the shape of the carry.
    inputs = [ops.moveaxis(x, 1, 0) for x in (query, key, value, log_decay)]

    def advance(carry: Any, position: Any) -> tuple[Any, Any]:
        carry = gated_linear_attention_step(
            *(ops.take(x, position, axis=0) for x in inputs), carry[1], scale=scale
        )
        return carry, carry

    carry = (ops.zeros_like(inputs[2][0]), initial_state)
    (_, final_state), (outputs, _) = scan(advance, carry, ops.shape(value)[1])
    return ops.moveaxis(outputs, 0, 1), final_state


@symbolic
def gated_linear_attention(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    initial_state: Any = None,
    *,
    scale: float | None = None,
    chunk_size: int = 64,
    segment_ids: Any = None,
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
        segment_ids: optional integers (batch, time). Where they differ from the position before,
            a segment begins, from an empty state; the first position continues `initial_state`.

    Returns:
        outputs (batch, time, heads, value_dim) in the dtype of `value`, and the final state in
        float32 (float64 if any input is float64).

    Raises:
        ValueError: shapes that do not fit together, an array that is not floating-point, or a
            `chunk_size` that is not an integer of at least 1.

    Example:

    >>> import numpy as np
    >>> from elita_tf import ops
    >>> ones, half = np.ones((1, 3, 1, 1)), np.full((1, 3, 1, 1), np.log(0.5))
    >>> outputs, state = ops.gated_linear_attention(ones, ones, ones, half)
    >>> [float(y) for y in np.ravel(outputs)]
    [1.0, 1.5, 1.75]
    """
    inputs = (query, key, value, log_decay)
    _require(
        "gated_linear_attention",
        inputs,
        initial_state,
        scale,
        chunk_size=chunk_size,
        segments=segment_ids,
    )
    if segment_ids is not None:
        log_decay = _forget(log_decay, segment_starts(segment_ids))
    time, outputs_dtype = ops.shape(value)[1], value.dtype
    chunk_size = fit_chunk_size(chunk_size, time)
    state = _initial_state(query, key, value, log_decay, initial_state)
    scale = _scale(query, scale)
    query, key, value, log_decay = (
        split_chunks(ops.cast(x, state.dtype), chunk_size) for x in (query, key, value, log_decay)
    )
    scores, query, key, log_decay = _join_positions(scale * query, key, log_decay)
    starts, final_state = _carry(
        log_decay[..., None], ops.matmul(ops.swapaxes(key, -1, -2), value), state
    )
    outputs = ops.matmul(scores, value) + ops.matmul(query, starts)
    return ops.cast(merge_chunks(outputs, time), outputs_dtype), final_state


def _require(
    owner: str,
    inputs: tuple[Any, Any, Any, Any],
    state: Any,
    scale: Any,
    axes: str = SEQUENCE,
    chunk_size: Any = 1,
    segments: Any = None,
) -> None:
    """Check the arguments of any form of `gated_linear_attention`; `axes` are all but the last.

    A step needs a state, the forms over a sequence have an empty one by default.
    """
    named = dict(zip(("query", "key", "value", "log_decay"), inputs, strict=True))
    tensors = {name: (tensor, f"{axes} key_dim") for name, tensor in named.items()}
    tensors["value"] = named["value"], f"{axes} value_dim"
    if state is not None or axes == STEP:
        tensors["state"] = state, "batch heads key_dim value_dim"
    require_shapes(owner, **tensors, **segments_of(axes, segments))
    require_floating(owner, **named)
    require_segments(owner, axes, segments)
    require_positive(owner, chunk_size=chunk_size)
    if scale is not None and not isinstance(scale, (int, float)) and not hasattr(scale, "dtype"):
        raise ValueError(
            f"`scale` of {owner} multiplies the outputs: expected a number, received {scale!r}."
        )


def _forget(log_decay: Any, start: Any) -> Any:
    """The log_decay with -inf, which forgets all before, where a segment starts."""
    return ops.where(start[..., None, None], -float("inf"), log_decay)


def _carry(log_decay: Any, increments: Any, state: Any) -> tuple[Any, Any]:
    """The states before every chunk, (b, n, h, k, v), and the one after the last."""
    if log_decay.shape[1] == 1:
        # A loop over one chunk carries nothing, but XLA would take seconds to find that out.
        return state[:, None], ops.exp(log_decay[:, 0]) * state + increments[:, 0]
    (ends,), (final_state,) = running_sums(log_decay, [increments], [state])
    return ops.concatenate([state[:, None], ends[:, :-1]], axis=1), final_state


def _join_positions(query: Any, key: Any, log_decay: Any) -> tuple[Any, Any, Any, Any]:
    """Scores within each chunk, and what links the chunk to the states at its borders.

    Args:
        query, key, log_decay: (b, n, h, c, k), c a power of two.

    Returns:
        scores (b, n, h, c, c), lower triangular; query (b, n, h, c, k), decayed from the chunk's
        start; key (b, n, h, c, k), decayed to the chunk's end; log_decay (b, n, h, k), of the
        whole chunk.
    """
    # Every position is a block of one row; blocks are on the axis before the rows.
    query, key, log_decay = (ops.expand_dims(x, -2) for x in (query, key, log_decay))
    scores = ops.sum(query * key, axis=-1, keepdims=True)
    query = query * ops.exp(log_decay)
    while scores.shape[-3] > 1:
        scores, query, key, log_decay = _join_pairs(scores, query, key, log_decay)
    scores, query, key, log_decay = (x[..., 0, :, :] for x in (scores, query, key, log_decay))
    return scores, query, key, log_decay[..., 0, :]


def _join_pairs(scores: Any, query: Any, key: Any, log_decay: Any) -> tuple[Any, Any, Any, Any]:
    """Half as many blocks, each twice as long; log_decay has one row per block."""
    (scores_left, scores_right), (query_left, query_right), (key_left, key_right), (left, right) = (
        _pairs(x) for x in (scores, query, key, log_decay)
    )
    if query_right.shape[-2] > _FEW_ROWS:
        across = ops.matmul(query_right, ops.swapaxes(key_left, -1, -2))
    else:
        across = ops.sum(query_right[..., :, None, :] * key_left[..., None, :, :], axis=-1)
    upper = ops.concatenate([scores_left, ops.zeros_like(across)], axis=-1)
    lower = ops.concatenate([across, scores_right], axis=-1)
    return (
        ops.concatenate([upper, lower], axis=-2),
        ops.concatenate([query_left, query_right * ops.exp(left)], axis=-2),
        ops.concatenate([key_left * ops.exp(right), key_right], axis=-2),
        left + right,
    )


def _pairs(x: Any) -> list[Any]:
    """The left and the right block of every pair: unstacked, as the gradient is then one stack."""
    *leading, blocks, rows, features = ops.shape(x)
    return ops.unstack(ops.reshape(x, (*leading, blocks // 2, 2, rows, features)), 2, axis=-3)


def _scale(query: Any, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _initial_state(query: Any, key: Any, value: Any, log_decay: Any, initial_state: Any) -> Any:
    dtype = state_dtype(query, key, value, log_decay)
    if initial_state is not None:
        return ops.cast(initial_state, dtype)
    batch_size, _, num_heads, value_dim = ops.shape(value)
    return ops.zeros((batch_size, num_heads, query.shape[-1], value_dim), dtype=dtype)
