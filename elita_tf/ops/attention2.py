"""Attention2 (ELiTA): softmax over scalar logits in linear time, exact in log space.

    y_i = (e^self_i v_i + e^query_i S_i) / (e^self_i + e^query_i Z_i)
    S_i = e^log_decay_i S_{i-1} + e^key_i v_i
    Z_i = e^log_decay_i Z_{i-1} + e^key_i

| here          | ELiTA's text                                  |
|---------------|-----------------------------------------------|
| key_logits    | k_1 . x_i + p_{1,i} . c  (the log of X_i)     |
| query_logits  | p_{2,i} . c  (later also + k_3 . x_i)         |
| self_logits   | k_2 . x_i                                     |
| value         | V x_i                                         |
| log_decay     | (none: 0)                                     |

Source: the elita-transformer repository, equations of its README. The decay is this package's: a
forget gate for every head.

All forms hold S and Z divided by e^max_logit, where

    max_logit_i = max(max_logit_{i-1} + log_decay_i, key_i)

and use y = v + g (S / Z - v) with g = sigmoid(query + log Z - self), so no exponential overflows.
The maximum is an anchor only. The sums pass from position to position by the factor
exp((max_logit_{i-1} - max_logit_i) + log_decay_i), in this order: what rounding takes from a large
maximum then stays in the sums.
"""

from typing import Any, NamedTuple

from keras import ops

from elita_tf.ops.arguments import (
    SEQUENCE,
    STEP,
    require_counts,
    require_floating,
    require_segments,
    require_shapes,
    segments_of,
)
from elita_tf.ops.chunking import state_dtype
from elita_tf.ops.loops import scan
from elita_tf.ops.running import decayed_maximum, running_maximum, running_sums
from elita_tf.ops.segments import segment_starts
from elita_tf.ops.symbolic import symbolic


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


@symbolic
def attention2_step(
    key_logits: Any,
    query_logits: Any,
    self_logits: Any,
    value: Any,
    state: Attention2State,
    *,
    log_decay: Any = None,
    segment_start: Any = None,
) -> tuple[Any, Attention2State]:
    """One position: logits and log_decay (batch, heads), value (batch, heads, value_dim).

    Rows where boolean `segment_start` (batch,) is true start from the empty state.
    """
    logits = (key_logits, query_logits, self_logits)
    _require("attention2_step", logits, value, state, log_decay, segment_start, STEP)
    dtype, outputs_dtype = state_dtype(key_logits, value), value.dtype
    key_logits, query_logits, self_logits, value, log_decay = _cast(
        dtype, key_logits, query_logits, self_logits, value, log_decay
    )
    previous = Attention2State(*_cast(dtype, *state))
    if segment_start is not None:
        previous = _restarted(previous, segment_start)
    earlier = previous.max_logit if log_decay is None else previous.max_logit + log_decay
    max_logit = ops.maximum(earlier, key_logits)
    carried = _exp_difference(previous.max_logit, max_logit, log_decay)
    weight = _exp_difference(key_logits, max_logit)
    state = Attention2State(
        max_logit=max_logit,
        numerator=carried[..., None] * previous.numerator + weight[..., None] * value,
        denominator=carried * previous.denominator + weight,
    )
    return ops.cast(_mix(value, query_logits, self_logits, state), outputs_dtype), state


@symbolic
def attention2_recurrent(
    key_logits: Any,
    query_logits: Any,
    self_logits: Any,
    value: Any,
    initial_state: Attention2State | None = None,
    *,
    log_decay: Any = None,
    segment_ids: Any = None,
) -> tuple[Any, Attention2State]:
    """The definition: `attention2_step` in a loop over time. Arguments as for `attention2`."""
    logits = (key_logits, query_logits, self_logits)
    _require("attention2_recurrent", logits, value, initial_state, log_decay, segment_ids)
    initial_state = _initial_state(key_logits, value, initial_state)
    # Time first, so that a position is a row; outputs ride in the carry, as `scan` stacks only
    # what has the shape of the carry.
    inputs = [ops.moveaxis(x, 1, 0) for x in (key_logits, query_logits, self_logits, value)]
    options = {"log_decay": log_decay}
    if segment_ids is not None:
        options["segment_start"] = segment_starts(segment_ids)
    options = {k: ops.swapaxes(x, 0, 1) for k, x in options.items() if x is not None}

    def advance(carry: Any, position: Any) -> tuple[Any, Any]:
        outputs, state = attention2_step(
            *(ops.take(x, position, axis=0) for x in inputs),
            Attention2State(*carry[1:]),
            **{name: ops.take(x, position, axis=0) for name, x in options.items()},
        )
        return (outputs, *state), (outputs, *state)

    carry = (ops.zeros_like(inputs[3][0]), *initial_state)
    (_, *final), (outputs, *_) = scan(advance, carry, ops.shape(value)[1])
    return ops.moveaxis(outputs, 0, 1), Attention2State(*final)


@symbolic
def attention2(
    key_logits: Any,
    query_logits: Any,
    self_logits: Any,
    value: Any,
    initial_state: Attention2State | None = None,
    *,
    log_decay: Any = None,
    segment_ids: Any = None,
) -> tuple[Any, Attention2State]:
    """Attention2 over a sequence, in time and memory linear in its length.

    The running maximum of the keys is known first. Against it, every weight e^(key_i - max_i) and
    every decay e^(max_{i-1} - max_i) of the sums so far is at most 1. Nothing is clipped.

    Args:
        key_logits: (batch, time, heads). -inf adds nothing to the state, and no gradient flows.
        query_logits: (batch, time, heads).
        self_logits: (batch, time, heads).
        value: (batch, time, heads, value_dim).
        initial_state: `Attention2State`, by default empty.
        log_decay: optional (batch, time, heads), at most 0, by default 0: what the position
            leaves of all before it, itself excluded. -inf forgets all before it. A position takes
            no part at all where its key logit is -inf and its log_decay 0.
        segment_ids: optional integers (batch, time). Where they differ from the position before,
            a segment begins, from an empty state; the first position continues `initial_state`.

    Returns:
        outputs (batch, time, heads, value_dim) in the dtype of `value`, and the final
        `Attention2State`. Where nothing is kept, the output is the value itself.

    Raises:
        ValueError: shapes that do not fit together, or an array that is not floating-point.

    Example:

    >>> import numpy as np
    >>> from elita_tf import ops
    >>> zeros, value = np.zeros((1, 3, 1)), np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    >>> outputs, state = ops.attention2(zeros, zeros, zeros, value)
    >>> [round(float(y), 4) for y in np.ravel(outputs)]  # (v_i + v_1 + ... + v_i) / (1 + i)
    [1.0, 1.6667, 2.25]
    """
    logits = (key_logits, query_logits, self_logits)
    _require("attention2", logits, value, initial_state, log_decay, segment_ids)
    dtype, outputs_dtype = state_dtype(key_logits, value), value.dtype
    initial_state = _initial_state(key_logits, value, initial_state)
    key_logits, query_logits, self_logits, value, log_decay = _cast(
        dtype, key_logits, query_logits, self_logits, value, log_decay
    )
    starts = None if segment_ids is None else segment_starts(segment_ids)[..., None]
    if log_decay is not None and starts is not None:
        log_decay, starts = ops.where(starts, -float("inf"), log_decay), None
    # Maxima cancel out of every result, so no gradient goes through them.
    before, maxima = _anchors(key_logits, log_decay, initial_state.max_logit, starts)
    weights = _exp_difference(key_logits, maxima)[..., None]
    (numerator, denominator), sums = running_sums(
        log_decay=_difference(before, maxima, log_decay)[..., None],
        increments=[weights * value, weights],
        initial=_anchored_sums(initial_state),
    )
    outputs = _mix(
        value, query_logits, self_logits, Attention2State(maxima, numerator, denominator[..., 0])
    )
    max_logit = _final_maximum(key_logits, log_decay, initial_state.max_logit, before, maxima)
    factor = _exp_difference(maxima[:, -1], max_logit)[..., None]
    numerator, denominator = (factor * x for x in sums)
    final_state = Attention2State(max_logit, numerator, denominator[..., 0])
    return ops.cast(outputs, outputs_dtype), final_state


def _require(
    owner: str,
    logits: tuple[Any, Any, Any],
    value: Any,
    state: Any,
    log_decay: Any = None,
    segments: Any = None,
    axes: str = SEQUENCE,
) -> None:
    """Check the arguments of any form of `attention2`; `axes` are those of the logits.

    A step needs a state, the forms over a sequence have an empty one by default.
    """
    named = dict(zip(("key_logits", "query_logits", "self_logits"), logits, strict=True))
    if log_decay is not None:
        named["log_decay"] = log_decay
    tensors = {name: (tensor, axes) for name, tensor in named.items()}
    tensors["value"] = value, f"{axes} value_dim"
    if state is not None or axes == STEP:
        leaves = Attention2State._fields
        if not isinstance(state, tuple) or len(state) != len(leaves):
            raise ValueError(
                f"The state of {owner}: expected an `Attention2State` of {', '.join(leaves)}, "
                f"received {type(state).__name__}. Take one that an op returned, or "
                "`attention2_empty_state`."
            )
        state_axes = ("batch heads", "batch heads value_dim", "batch heads")
        tensors |= dict(zip(leaves, zip(state, state_axes, strict=True), strict=True))
    require_shapes(owner, **tensors, **segments_of(axes, segments))
    require_floating(owner, **named, value=value)
    require_segments(owner, axes, segments)


def _cast(dtype: str, *tensors: Any) -> list[Any]:
    return [None if x is None else ops.cast(x, dtype) for x in tensors]


def _anchors(key_logits: Any, log_decay: Any, initial: Any, starts: Any) -> tuple[Any, Any]:
    """max_logit before and after every position, as constants, both (batch, time, heads)."""
    key_logits, initial = ops.stop_gradient(key_logits), ops.stop_gradient(initial)
    if log_decay is None:
        maxima = running_maximum(key_logits, initial, starts)
    else:
        maxima = decayed_maximum(key_logits, initial, ops.stop_gradient(log_decay))
    maxima = ops.stop_gradient(maxima)
    before = ops.concatenate([initial[:, None], maxima[:, :-1]], axis=1)
    return before if starts is None else ops.where(starts, -float("inf"), before), maxima


def _final_maximum(key_logits: Any, log_decay: Any, initial: Any, before: Any, maxima: Any) -> Any:
    """The last of the constant maxima, with its gradient put back.

    Its value is the key logit of the last position that raised the maximum (or else the initial
    maximum), plus the log-decays after that position.
    """
    earlier = before if log_decay is None else before + log_decay
    positions = ops.arange(ops.shape(maxima)[1], dtype="int32")[None, :, None]
    is_new = ops.logical_or(key_logits > earlier, ops.equal(earlier, -float("inf")))
    last = ops.max(ops.where(is_new, positions, -1), axis=1, keepdims=True)
    terms = [ops.where(ops.equal(positions, last), key_logits, 0.0)]
    if log_decay is not None:
        terms.append(ops.where(positions > last, log_decay, 0.0))
    path = ops.where(last[:, 0] < 0, initial, 0.0) + sum(ops.sum(x, axis=1) for x in terms)
    path = ops.where(path > -float("inf"), path, 0.0)
    return maxima[:, -1] + (path - ops.stop_gradient(path))


def _mix(value: Any, query_logits: Any, self_logits: Any, state: Attention2State) -> Any:
    """y = v + g (S / Z - v): the past's average against the position's own value."""
    kept = state.denominator > 0
    denominator = ops.where(kept, state.denominator, ops.ones_like(state.denominator))
    max_logit = ops.where(kept, state.max_logit, ops.zeros_like(state.max_logit))
    gate = ops.sigmoid(query_logits + max_logit + ops.log(denominator) - self_logits)
    gate = ops.where(kept, gate, ops.zeros_like(gate))
    return value + gate[..., None] * (state.numerator / denominator[..., None] - value)


def _exp_difference(logit: Any, anchor: Any, log_decay: Any = None) -> Any:
    """e^`_difference`: 0, with gradient 0, where nothing is kept."""
    return ops.exp(_difference(logit, anchor, log_decay))


def _difference(logit: Any, anchor: Any, log_decay: Any = None) -> Any:
    """logit - anchor + log_decay, at most 0; -inf where logit or log_decay is, whatever anchor."""
    kept, difference = logit > -float("inf"), logit - anchor
    if log_decay is not None:
        # The anchor is -inf where the sum of a logit and a decay is too small for a number.
        smallest = ops.minimum(log_decay, anchor)
        kept = ops.logical_and(kept, smallest > -float("inf"))
        difference = difference + log_decay
    return ops.where(kept, difference, -float("inf"))


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
