"""Attention2 (ELiTA): softmax over scalar logits in linear time, exact in log space.

    y_i = (e^self_i v_i + e^query_i S_i) / (e^self_i + e^query_i Z_i)
    S_i = sum_{j<=i} e^key_j v_j            Z_i = sum_{j<=i} e^key_j

| here          | ELiTA's text                                  |
|---------------|-----------------------------------------------|
| key_logits    | k_1 . x_i + p_{1,i} . c  (the log of X_i)     |
| query_logits  | p_{2,i} . c  (later also + k_3 . x_i)         |
| self_logits   | k_2 . x_i                                     |
| value         | V x_i                                         |

Source: the elita-transformer repository, equations of its README.

Both forms hold S and Z divided by e^max_logit, the largest key so far, and use
y = v + g (S / Z - v) with g = sigmoid(query + log Z - self), so no exponential overflows.
"""

from typing import Any, NamedTuple

from keras import ops

from elita_tf.ops.arguments import STEP, require_attention2, require_counts
from elita_tf.ops.chunking import state_dtype
from elita_tf.ops.running import running_maximum, running_sums
from elita_tf.ops.segments import last_segment, segment_starts


class Attention2State(NamedTuple):
    """What the past leaves behind: S = e^max_logit * numerator and Z = e^max_logit * denominator.

    max_logit and denominator are (batch, heads), numerator (batch, heads, value_dim); max_logit
    is -inf while nothing has been kept.
    """

    max_logit: Any
    numerator: Any
    denominator: Any


def attention2_empty_state(
    batch_size: Any, num_heads: int, value_dim: int, dtype: str = "float32"
) -> Attention2State:
    """The state before the first position."""
    sizes = {"batch_size": batch_size, "num_heads": num_heads, "value_dim": value_dim}
    require_counts("attention2_empty_state", **sizes)
    return Attention2State(
        max_logit=ops.full((batch_size, num_heads), -float("inf"), dtype=dtype),
        numerator=ops.zeros((batch_size, num_heads, value_dim), dtype=dtype),
        denominator=ops.zeros((batch_size, num_heads), dtype=dtype),
    )


def attention2_step(
    key_logits: Any,
    query_logits: Any,
    self_logits: Any,
    value: Any,
    state: Attention2State,
    *,
    segment_start: Any = None,
) -> tuple[Any, Attention2State]:
    """One position: logits (batch, heads), value (batch, heads, value_dim).

    Rows where boolean `segment_start` (batch,) is true start from the empty state.
    """
    logits = (key_logits, query_logits, self_logits)
    require_attention2("attention2_step", logits, value, state, STEP, segment_start)
    dtype = state_dtype(key_logits, value)
    outputs_dtype = value.dtype
    key_logits, query_logits, self_logits, value = (
        ops.cast(x, dtype) for x in (key_logits, query_logits, self_logits, value)
    )
    previous = Attention2State(*(ops.cast(x, dtype) for x in state))
    if segment_start is not None:
        previous = _restarted(previous, segment_start)
    max_logit = ops.maximum(previous.max_logit, key_logits)
    carried = _exp_difference(previous.max_logit, max_logit)
    weight = _exp_difference(key_logits, max_logit)
    state = Attention2State(
        max_logit=max_logit,
        numerator=carried[..., None] * previous.numerator + weight[..., None] * value,
        denominator=carried * previous.denominator + weight,
    )
    return ops.cast(_mix(value, query_logits, self_logits, state), outputs_dtype), state


def attention2_recurrent(
    key_logits: Any,
    query_logits: Any,
    self_logits: Any,
    value: Any,
    initial_state: Attention2State | None = None,
    *,
    segment_ids: Any = None,
) -> tuple[Any, Attention2State]:
    """The definition: `attention2_step` in a loop over time. Arguments as for `attention2`."""
    logits = (key_logits, query_logits, self_logits)
    require_attention2("attention2_recurrent", logits, value, initial_state, segments=segment_ids)
    initial_state = _initial_state(key_logits, value, initial_state)
    # Time first, so that a position is a row; outputs ride in the carry, as `ops.scan` stacks
    # only what has the shape of the carry.
    inputs = [ops.moveaxis(x, 1, 0) for x in (key_logits, query_logits, self_logits, value)]
    starts = None if segment_ids is None else ops.swapaxes(segment_starts(segment_ids), 0, 1)

    def advance(carry: Any, position: Any) -> tuple[Any, Any]:
        outputs, state = attention2_step(
            *(ops.take(x, position, axis=0) for x in inputs),
            Attention2State(*carry[1:]),
            segment_start=None if starts is None else ops.take(starts, position, axis=0),
        )
        return (outputs, *state), (outputs, *state)

    carry = (ops.zeros_like(inputs[3][0]), *initial_state)
    (_, *final), (outputs, *_) = ops.scan(advance, carry, ops.arange(ops.shape(value)[1]))
    return ops.moveaxis(outputs, 0, 1), Attention2State(*final)


def attention2(
    key_logits: Any,
    query_logits: Any,
    self_logits: Any,
    value: Any,
    initial_state: Attention2State | None = None,
    *,
    segment_ids: Any = None,
) -> tuple[Any, Attention2State]:
    """Attention2 over a sequence, in time and memory linear in its length.

    The running maximum of the keys is known first. Against it, every weight e^(key_i - max_i) and
    every decay e^(max_{i-1} - max_i) of the sums so far is at most 1. Nothing is clipped.

    Args:
        key_logits: (batch, time, heads). -inf drops the position: the state passes unchanged and
            no gradient flows.
        query_logits: (batch, time, heads).
        self_logits: (batch, time, heads).
        value: (batch, time, heads, value_dim).
        initial_state: `Attention2State`, by default empty.
        segment_ids: optional integers (batch, time). Where they differ from the position before,
            a segment begins, from an empty state; the first position continues `initial_state`.

    Returns:
        outputs (batch, time, heads, value_dim) in the dtype of `value`, and the final
        `Attention2State`. Where no key has been kept yet, the output is the value itself.

    Raises:
        ValueError: shapes that do not fit together, or no floating-point numbers.

    Example:

    >>> import numpy as np
    >>> from elita_tf import ops
    >>> zeros, value = np.zeros((1, 3, 1)), np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    >>> outputs, state = ops.attention2(zeros, zeros, zeros, value)
    >>> [round(float(y), 4) for y in np.ravel(outputs)]  # (v_i + v_1 + ... + v_i) / (1 + i)
    [1.0, 1.6667, 2.25]
    """
    logits = (key_logits, query_logits, self_logits)
    require_attention2("attention2", logits, value, initial_state, segments=segment_ids)
    dtype, outputs_dtype = state_dtype(key_logits, value), value.dtype
    initial_state = _initial_state(key_logits, value, initial_state)
    key_logits, query_logits, self_logits, value = (
        ops.cast(x, dtype) for x in (key_logits, query_logits, self_logits, value)
    )
    # Maxima cancel out of every result, so no gradient goes through them.
    start = ops.stop_gradient(initial_state.max_logit)
    starts = None if segment_ids is None else segment_starts(segment_ids)[..., None]
    maxima = ops.stop_gradient(running_maximum(ops.stop_gradient(key_logits), start, starts))
    before = ops.concatenate([start[:, None], maxima[:, :-1]], axis=1)
    if starts is not None:
        before = ops.where(starts, -float("inf"), before)
    weights = _exp_difference(key_logits, maxima)[..., None]
    (numerator, denominator), final = running_sums(
        decay=_exp_difference(before, maxima)[..., None],
        increments=[weights * value, weights],
        initial=_anchored_sums(initial_state),
    )
    state = Attention2State(maxima, numerator, denominator[..., 0])
    outputs = _mix(value, query_logits, self_logits, state)
    return ops.cast(outputs, outputs_dtype), _final_state(key_logits, initial_state, final, starts)


def _mix(value: Any, query_logits: Any, self_logits: Any, state: Attention2State) -> Any:
    """y = v + g (S / Z - v): the past's average against the position's own value."""
    kept = state.denominator > 0
    denominator = ops.where(kept, state.denominator, ops.ones_like(state.denominator))
    max_logit = ops.where(kept, state.max_logit, ops.zeros_like(state.max_logit))
    gate = ops.sigmoid(query_logits + max_logit + ops.log(denominator) - self_logits)
    gate = ops.where(kept, gate, ops.zeros_like(gate))
    return value + gate[..., None] * (state.numerator / denominator[..., None] - value)


def _exp_difference(logit: Any, anchor: Any) -> Any:
    """e^(logit - anchor) for logit <= anchor; 0, with gradient 0, at a logit of -inf."""
    empty = ops.full_like(anchor, -float("inf"))
    return ops.exp(ops.where(logit > -float("inf"), logit - anchor, empty))


def _initial_state(
    key_logits: Any, value: Any, initial_state: Attention2State | None
) -> Attention2State:
    dtype = state_dtype(key_logits, value)
    if initial_state is None:
        batch_size, _, num_heads, value_dim = ops.shape(value)
        return attention2_empty_state(batch_size, num_heads, value_dim, dtype)
    return Attention2State(*(ops.cast(x, dtype) for x in initial_state))


def _anchored_sums(state: Attention2State) -> list[Any]:
    """Numerator and denominator; the factor is 1 and carries max_logit's gradient."""
    factor = _exp_difference(state.max_logit, ops.stop_gradient(state.max_logit))[..., None]
    return [factor * state.numerator, factor * state.denominator[..., None]]


def _restarted(state: Attention2State, start: Any) -> Attention2State:
    """The state, empty in the rows where `start` (batch,) is true."""
    start = start[:, None]
    return Attention2State(
        max_logit=ops.where(start, -float("inf"), state.max_logit),
        numerator=ops.where(start[..., None], ops.zeros_like(state.numerator), state.numerator),
        denominator=ops.where(start, ops.zeros_like(state.denominator), state.denominator),
    )


def _final_state(
    key_logits: Any, initial_state: Attention2State, sums: list[Any], starts: Any
) -> Attention2State:
    """The state of `sums`, whose maximum was a constant, with its gradient put back."""
    start = initial_state.max_logit
    if starts is not None:
        kept, continued = last_segment(starts)
        key_logits = ops.where(kept, key_logits, -float("inf"))
        start = ops.where(continued, start, -float("inf"))
    max_logit = ops.maximum(start, ops.max(key_logits, axis=1))
    factor = _exp_difference(ops.stop_gradient(max_logit), max_logit)[..., None]
    numerator, denominator = (factor * x for x in sums)
    return Attention2State(max_logit, numerator, denominator[..., 0])
