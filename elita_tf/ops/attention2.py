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

from elita_tf.ops.chunking import (
    decayed_sums,
    fit_chunk_size,
    merge_chunks,
    running_maximum,
    split_chunks,
    state_dtype,
)

# Large enough that the scan over chunks is short, small enough that a chunk's weights stay cached.
_CHUNK_SIZE = 32


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
    return Attention2State(
        max_logit=ops.full((batch_size, num_heads), -float("inf"), dtype=dtype),
        numerator=ops.zeros((batch_size, num_heads, value_dim), dtype=dtype),
        denominator=ops.zeros((batch_size, num_heads), dtype=dtype),
    )


def attention2_step(
    key_logits: Any, query_logits: Any, self_logits: Any, value: Any, state: Attention2State
) -> tuple[Any, Attention2State]:
    """One position: logits (batch, heads), value (batch, heads, value_dim)."""
    dtype = state_dtype(key_logits, value)
    outputs_dtype = value.dtype
    key_logits, query_logits, self_logits, value = (
        ops.cast(x, dtype) for x in (key_logits, query_logits, self_logits, value)
    )
    previous = Attention2State(*(ops.cast(x, dtype) for x in state))
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
) -> tuple[Any, Attention2State]:
    """The definition: `attention2_step` in a loop over time. Arguments as for `attention2`."""
    initial_state = _initial_state(key_logits, value, initial_state)
    # Time first, so that a position is a row; outputs ride in the carry, as `ops.scan` stacks
    # only what has the shape of the carry.
    inputs = [ops.moveaxis(x, 1, 0) for x in (key_logits, query_logits, self_logits, value)]

    def advance(carry: Any, position: Any) -> tuple[Any, Any]:
        outputs, state = attention2_step(
            *(ops.take(x, position, axis=0) for x in inputs), Attention2State(*carry[1:])
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
) -> tuple[Any, Attention2State]:
    """Attention2 over a sequence, in time and memory linear in its length.

    Within a chunk each row is a small causal matrix of weights e^(key_j - max_i), at most 1, times
    the values; between chunks the state is carried by a scan. Nothing is clipped.

    Args:
        key_logits: (batch, time, heads). -inf drops the position: the state passes unchanged and
            no gradient flows.
        query_logits: (batch, time, heads).
        self_logits: (batch, time, heads).
        value: (batch, time, heads, value_dim).
        initial_state: `Attention2State`, by default empty.

    Returns:
        outputs (batch, time, heads, value_dim) in the dtype of `value`, and the final
        `Attention2State`. Where no key has been kept yet, the output is the value itself.

    Example:

    >>> import numpy as np
    >>> from elita_tf import ops
    >>> zeros, value = np.zeros((1, 3, 1)), np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1)
    >>> outputs, state = ops.attention2(zeros, zeros, zeros, value)
    >>> [round(float(y), 4) for y in np.ravel(outputs)]  # (v_i + v_1 + ... + v_i) / (1 + i)
    [1.0, 1.6667, 2.25]
    """
    dtype = state_dtype(key_logits, value)
    time, outputs_dtype = ops.shape(value)[1], value.dtype
    initial_state = _initial_state(key_logits, value, initial_state)
    key_logits, query_logits, self_logits, value = (
        ops.cast(x, dtype) for x in (key_logits, query_logits, self_logits, value)
    )
    chunk_size = fit_chunk_size(_CHUNK_SIZE, time)
    keys = split_chunks(key_logits, chunk_size, padding=-float("inf"))
    values = split_chunks(value, chunk_size)
    # One more feature, always 1: its weighted sum is the denominator.
    values = ops.concatenate([values, ops.ones_like(values[..., :1])], axis=-1)

    # Anchors cancel out of every result, so no gradient goes through them.
    running = _cumulative_maximum(ops.stop_gradient(keys))
    before, _ = running_maximum(running[..., -1], initial_state.max_logit)
    anchors = ops.maximum(before[..., None], running)
    after = anchors[..., -1]

    weights = _exp_difference(keys, after[..., None])
    starts, final = decayed_sums(
        decay=_exp_difference(before, after)[..., None],
        increments=ops.sum(weights[..., None] * values, axis=-2),
        initial=_anchored_sums(initial_state),
    )
    carried = _exp_difference(before[..., None], anchors)
    sums = _causal_sums(keys, anchors, values) + carried[..., None] * starts[..., None, :]

    state = Attention2State(anchors, sums[..., :-1], sums[..., -1])
    state = Attention2State(*(merge_chunks(x, time) for x in state))
    outputs = _mix(value, query_logits, self_logits, state)
    return ops.cast(outputs, outputs_dtype), _final_state(key_logits, initial_state, final)


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


def _cumulative_maximum(x: Any) -> Any:
    """Running maximum along the last axis, in log2(length) shifts."""
    shift = 1
    while shift < x.shape[-1]:
        filling = ops.full_like(x[..., :shift], -float("inf"))
        x = ops.maximum(x, ops.concatenate([filling, x[..., :-shift]], axis=-1))
        shift *= 2
    return x


@ops.custom_gradient
def _causal_sums(keys: Any, anchors: Any, values: Any) -> Any:
    """sum_{j<=i} e^(keys_j - anchors_i) values_j within each chunk; the anchors are constants."""

    def weights() -> Any:
        position = ops.arange(keys.shape[-1])
        visible = position[:, None] >= position[None, :]
        logits = ops.where(visible, keys[..., None, :], -float("inf"))
        return _exp_difference(logits, anchors[..., :, None])

    def grad(d_sums: Any) -> tuple[Any, Any, Any]:
        d_values = ops.matmul(ops.swapaxes(weights(), -1, -2), d_sums)
        # e^key_j scales the whole row j, so its log's gradient is the row times its gradient.
        return ops.sum(values * d_values, axis=-1), ops.zeros_like(anchors), d_values

    return ops.matmul(weights(), values), grad


def _initial_state(
    key_logits: Any, value: Any, initial_state: Attention2State | None
) -> Attention2State:
    dtype = state_dtype(key_logits, value)
    if initial_state is None:
        batch_size, _, num_heads, value_dim = ops.shape(value)
        return attention2_empty_state(batch_size, num_heads, value_dim, dtype)
    return Attention2State(*(ops.cast(x, dtype) for x in initial_state))


def _anchored_sums(state: Attention2State) -> Any:
    """Numerator and denominator in one array; the factor is 1 and carries max_logit's gradient."""
    sums = ops.concatenate([state.numerator, state.denominator[..., None]], axis=-1)
    return sums * _exp_difference(state.max_logit, ops.stop_gradient(state.max_logit))[..., None]


def _final_state(key_logits: Any, initial_state: Attention2State, sums: Any) -> Attention2State:
    """The state of `sums`, whose anchor was a constant, with max_logit's gradient put back."""
    max_logit = ops.maximum(initial_state.max_logit, ops.max(key_logits, axis=1))
    sums = sums * _exp_difference(ops.stop_gradient(max_logit), max_logit)[..., None]
    return Attention2State(max_logit, sums[..., :-1], sums[..., -1])
