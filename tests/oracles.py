"""The equations of elita_tf.ops as float64 loops in NumPy, with gradients in closed form.

Nothing here shares code or method with the package: no chunks, no automatic differentiation.
Gradients take the cotangents of all outputs, those of the final state included.
"""

from collections.abc import Sequence

import numpy as np

Array = np.ndarray


def sigmoid(logits: Array) -> Array:
    """Logistic function without overflow."""
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1.0, small) / (1.0 + small)


def weight(logits: Array, maximum: Array) -> Array:
    """exp(logits - maximum), 0 for a logit of -inf even where the maximum is -inf as well."""
    empty = np.isneginf(logits)
    return np.where(empty, 0.0, np.exp(np.where(empty, 0.0, logits - np.where(empty, 0, maximum))))


def empty_attention2_state(value: Array) -> tuple[Array, Array, Array]:
    """(max_logit, numerator, denominator) of no position at all."""
    batch, _, heads, value_dim = value.shape
    return (
        np.full((batch, heads), -np.inf),
        np.zeros((batch, heads, value_dim)),
        np.zeros((batch, heads)),
    )


def attention2(
    key_logits: Array,
    query_logits: Array,
    self_logits: Array,
    value: Array,
    initial_state: Sequence[Array] | None = None,
    log_decay: Array | None = None,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """y_i = (e^self_i v_i + e^query_i S_i) / (e^self_i + e^query_i Z_i), position by position."""
    maximum, numerator, denominator = initial_state or empty_attention2_state(value)
    log_decay = np.zeros_like(key_logits) if log_decay is None else log_decay
    outputs = np.empty_like(value)
    for i in range(value.shape[1]):
        aged = maximum + log_decay[:, i]
        maximum = np.maximum(aged, key_logits[:, i])
        kept, new = weight(aged, maximum), weight(key_logits[:, i], maximum)
        numerator = kept[..., None] * numerator + new[..., None] * value[:, i]
        denominator = kept * denominator + new
        gate = attention2_gate(query_logits[:, i], self_logits[:, i], maximum, denominator)
        average = numerator / np.where(denominator > 0, denominator, 1.0)[..., None]
        outputs[:, i] = value[:, i] + gate[..., None] * (average - value[:, i])
    return outputs, (maximum, numerator, denominator)


def attention2_gate(query: Array, own: Array, maximum: Array, denominator: Array) -> Array:
    """Share of the output that comes from the past, 0 while nothing is kept."""
    kept = denominator > 0
    log_sum = np.where(kept, maximum, 0.0) + np.log(np.where(kept, denominator, 1.0))
    return np.where(kept, sigmoid(query + log_sum - own), 0.0)


def attention2_gradients(
    arguments: Sequence, cotangents: Sequence[Array], log_decay: Array | None = None
) -> list[Array]:
    """Gradients in the order of the arguments, initial state and log_decay (if given) last."""
    value = arguments[3]
    state = arguments[4] if len(arguments) > 4 else empty_attention2_state(value)
    decay = np.zeros_like(arguments[0]) if log_decay is None else log_decay
    inputs = [*arguments[:4], *state, decay]
    by_outputs = attention2_output_gradients(inputs, cotangents[0])
    by_state = attention2_state_gradients(inputs, *cotangents[1:])
    gradients = [first + second for first, second in zip(by_outputs, by_state, strict=True)]
    chosen = gradients[: 7 if len(arguments) > 4 else 4]
    return chosen if log_decay is None else [*chosen, gradients[7]]


def aged_logits(key: Array, start: Array, decay: Array, position: int) -> tuple[list[Array], Array]:
    """What is left at a position of the key logits up to it, and of the initial maximum."""
    ages = [decay[:, j + 1 : position + 1].sum(axis=1) for j in range(-1, position + 1)]
    return [key[:, j] + ages[j + 1] for j in range(position + 1)], start + ages[0]


def attention2_output_gradients(inputs: Sequence[Array], d_outputs: Array) -> list[Array]:
    """Share of the outputs in the gradients: four inputs, three leaves of the state, log_decay."""
    key, query, own, value, start, start_num, start_den, decay = inputs
    gradients = [np.zeros_like(x) for x in inputs]
    d_key, d_query, d_own, d_value, d_start, d_start_num, d_start_den, d_decay = gradients
    for i in range(value.shape[1]):
        keys, first = aged_logits(key, start, decay, i)
        maximum = np.maximum(np.max(keys, axis=0), first)
        first = weight(first, maximum)
        weights = [weight(logit, maximum) for logit in keys]
        total = sum(weights) + first * start_den
        safe = np.where(total > 0, total, 1.0)
        terms = [w[..., None] * value[:, j] for j, w in enumerate(weights)]
        average = (sum(terms) + first[..., None] * start_num) / safe[..., None]
        gate = attention2_gate(query[:, i], own[:, i], maximum, total)
        d_y = d_outputs[:, i]
        d_logit = (d_y * (average - value[:, i])).sum(-1) * gate * (1.0 - gate)
        d_query[:, i] += d_logit
        d_own[:, i] -= d_logit
        d_value[:, i] += (1.0 - gate)[..., None] * d_y
        for j, w in enumerate(weights):
            share = w / safe
            away = (d_y * (value[:, j] - average)).sum(-1)
            d_aged = share * (d_logit + gate * away)
            d_key[:, j] += d_aged
            d_decay[:, j + 1 : i + 1] += d_aged[:, None]
            d_value[:, j] += (gate * share)[..., None] * d_y
        share = first / safe
        along = (d_y * start_num).sum(-1) - (d_y * average).sum(-1) * start_den
        d_aged = share * (d_logit * start_den + gate * along)
        d_start += d_aged
        d_decay[:, : i + 1] += d_aged[:, None]
        d_start_num += (gate * share)[..., None] * d_y
        d_start_den += share * (d_logit - gate * (d_y * average).sum(-1))
    return gradients


def attention2_state_gradients(
    inputs: Sequence[Array], d_maximum: Array, d_numerator: Array, d_denominator: Array
) -> list[Array]:
    """Share of the final state: sums of e^(key_j - maximum), so the maximum moves every term."""
    key, query, own, value, start, start_num, start_den, decay = inputs

    def pull(numerator: Array, denominator: Array) -> Array:
        return (numerator * d_numerator).sum(-1) + denominator * d_denominator

    state = start, start_num, start_den
    maximum, numerator, denominator = attention2(key, query, own, value, state, decay)[1]
    keys, first = aged_logits(key, start, decay, value.shape[1] - 1)
    # Rounding makes the sums differ from the maximum, so the largest of them is what it is.
    largest = np.maximum(np.max(keys, axis=0), first)
    d_maximum = d_maximum - pull(numerator, denominator)
    d_key, d_value, d_decay = np.zeros_like(key), np.zeros_like(value), np.zeros_like(decay)
    for j, logit in enumerate(keys):
        w = weight(logit, maximum)
        d_aged = w * pull(value[:, j], np.ones_like(w))
        d_aged += np.where((logit == largest) & (w > 0), d_maximum, 0.0)
        d_key[:, j] = d_aged
        d_decay[:, j + 1 :] += d_aged[:, None]
        d_value[:, j] = w[..., None] * d_numerator
    w = weight(first, maximum)
    d_start = w * pull(start_num, start_den)
    d_start += np.where((first == largest) & (w > 0), d_maximum, 0.0)
    d_decay += d_start[:, None]
    d_start_num, d_start_den = w[..., None] * d_numerator, w * d_denominator
    zeros = np.zeros_like(query)
    return [d_key, zeros, zeros, d_value, d_start, d_start_num, d_start_den, d_decay]


def gated_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    log_decay: Array,
    initial_state: Array | None = None,
    scale: float | None = None,
) -> tuple[Array, Array]:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + key_t value_t^T;  y_t = scale * query_t S_t."""
    states = gated_linear_attention_states(key, value, log_decay, initial_state)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = np.empty_like(value)
    for t in range(value.shape[1]):
        outputs[:, t] = scale * (query[:, t, :, :, None] * states[t + 1]).sum(-2)
    return outputs, states[-1]


def gated_linear_attention_states(
    key: Array, value: Array, log_decay: Array, initial_state: Array | None
) -> list[Array]:
    """The state before the first position and after every position."""
    batch, time, heads, key_dim = key.shape
    empty = np.zeros((batch, heads, key_dim, value.shape[-1]))
    states = [empty if initial_state is None else initial_state]
    for t in range(time):
        kept = np.exp(log_decay[:, t])[..., None] * states[-1]
        states.append(kept + key[:, t, :, :, None] * value[:, t, :, None, :])
    return states


def gated_linear_attention_gradients(
    arguments: Sequence[Array], cotangents: Sequence[Array], scale: float | None = None
) -> list[Array]:
    """Gradients in the order of the arguments, initial state (if given) last."""
    query, key, value, log_decay = arguments[:4]
    states = gated_linear_attention_states(key, value, log_decay, (*arguments[4:], None)[0])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    d_outputs, d_state = cotangents
    d_query, d_key, d_value, d_decay = (np.zeros_like(x) for x in (query, key, value, log_decay))
    for t in reversed(range(value.shape[1])):
        d_y = scale * d_outputs[:, t, :, None, :]
        d_query[:, t] = (d_y * states[t + 1]).sum(-1)
        d_state = d_state + query[:, t, :, :, None] * d_y
        d_key[:, t] = (d_state * value[:, t, :, None, :]).sum(-1)
        d_value[:, t] = (d_state * key[:, t, :, :, None]).sum(-2)
        d_state = np.exp(log_decay[:, t])[..., None] * d_state
        d_decay[:, t] = (d_state * states[t]).sum(-1)
    return [d_query, d_key, d_value, d_decay, d_state][: len(arguments)]


def feed_forward2(first: Array, second: Array, kernel: Array) -> Array:
    """y_d = sum over inner i and rank r of first_i second_r kernel_ird."""
    inner, rank, hidden = kernel.shape
    outputs = np.zeros((*first.shape[:-1], hidden))
    for i in range(inner):
        for r in range(rank):
            for d in range(hidden):
                outputs[..., d] += first[..., i] * second[..., r] * kernel[i, r, d]
    return outputs


def feed_forward2_gradients(
    first: Array, second: Array, kernel: Array, cotangent: Array
) -> list[Array]:
    """Gradients of the two factors and of the kernel."""
    d_first, d_second, d_kernel = (np.zeros_like(x) for x in (first, second, kernel))
    inner, rank, hidden = kernel.shape
    for i in range(inner):
        for r in range(rank):
            for d in range(hidden):
                d_first[..., i] += cotangent[..., d] * second[..., r] * kernel[i, r, d]
                d_second[..., r] += cotangent[..., d] * first[..., i] * kernel[i, r, d]
                d_kernel[i, r, d] = (cotangent[..., d] * first[..., i] * second[..., r]).sum()
    return [d_first, d_second, d_kernel]


def linear_cross_entropy(
    hidden: Array, kernel: Array, labels: Array, sample_weight: Array | None = None
) -> tuple[float, list[Array]]:
    """Weighted mean loss of materialised logits; gradients of hidden, kernel and sample_weight."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    weights = np.ones(len(rows)) if sample_weight is None else sample_weight.reshape(-1)
    total = weights.sum()
    losses, d_rows, d_kernel = np.empty(len(rows)), np.zeros_like(rows), np.zeros_like(kernel)
    for row, label in enumerate(labels.reshape(-1)):
        logits = kernel @ rows[row]
        exponentials = np.exp(logits - logits.max())
        losses[row] = np.log(exponentials.sum()) + logits.max() - logits[label]
        d_logits = exponentials / exponentials.sum()
        d_logits[label] -= 1.0
        share = weights[row] / total if total else 0.0
        d_rows[row] = share * (d_logits @ kernel)
        d_kernel += share * np.outer(d_logits, rows[row])
    loss = (weights * losses).sum() / total if total else 0.0
    d_weights = (losses - loss) / total if total else np.zeros_like(weights)
    return loss, [d_rows.reshape(hidden.shape), d_kernel, d_weights.reshape(labels.shape)]
