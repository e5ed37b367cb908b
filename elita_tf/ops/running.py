"""Running maxima and running sums over time, with and without decay, in two levels.

Time is cut into chunks. A loop over the positions of a chunk advances all chunks at once, from
zero; a loop over the chunks carries what each has added from one to the next; and a second loop
over positions, from there, gives the results. So the loops are short, whatever the length, and
each of their steps works on many positions at once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from elita_tf.ops.chunking import fit_chunk_size, merge_axis, split_axis, unpack_upstream
from elita_tf.ops.loops import repeat, scan

# Positions in a chunk: with more the loops over positions get long, with fewer that over chunks.
_CHUNK_SIZE = 32

_LOWEST_INTEGER = -(2**31)


class Algebra(NamedTuple):
    """What a recurrence s_t = plus(times(decay_t, s_{t-1}), x_t) is made of."""

    plus: Callable[[Any, Any], Any]
    zero: float  # plus(zero, x) is x
    times: Callable[[Any, Any], Any]
    one: float  # times(one, x) is x
    from_log: Callable[[Any], Any]  # decay_t from log_decay_t


_SUMS = Algebra(ops.add, 0.0, ops.multiply, 1.0, ops.exp)
_MAXIMA = Algebra(ops.maximum, -float("inf"), ops.add, 0.0, lambda log_decay: log_decay)


def running_maximum(x: Any, initial: Any, starts: Any = None) -> Any:
    """The largest of `initial` (b, ...) and all up to each position of `x` (b, t, ...).

    Where boolean `starts`, of the rank of `x`, is true, everything before that position is
    forgotten. Numbers may be integers.
    """
    lowest = -float("inf") if keras.backend.is_float_dtype(x.dtype) else _LOWEST_INTEGER
    chunks = _split(x, padding=lowest)
    started = None if starts is None else _split(starts, padding=False)

    def since_start(earlier: Any, started: Any) -> Any:
        return earlier if starts is None else ops.where(started, lowest, earlier)

    shift = 1
    while shift < chunks.shape[2]:
        filling = ops.full_like(chunks[:, :, :shift], lowest)
        shifted = ops.concatenate([filling, chunks[:, :, :-shift]], axis=2)
        chunks = ops.maximum(chunks, since_start(shifted, started))
        if started is not None:
            filling = ops.zeros_like(started[:, :, :shift])
            shifted = ops.concatenate([filling, started[:, :, :-shift]], axis=2)
            started = ops.logical_or(started, shifted)
        shift *= 2
    maxima = chunks[:, :, -1]

    def advance(maximum: Any, chunk: Any) -> tuple[Any, Any]:
        restarted = None if starts is None else ops.take(started[:, :, -1], chunk, axis=1)
        after = ops.maximum(since_start(maximum, restarted), ops.take(maxima, chunk, axis=1))
        return after, maximum

    _, before = scan(advance, initial, ops.shape(maxima)[1])
    before = since_start(ops.moveaxis(before, 0, 1)[:, :, None], started)
    return merge_axis(ops.maximum(chunks, before), ops.shape(x)[1], axis=1)


def decayed_maximum(x: Any, initial: Any, log_decay: Any) -> Any:
    """m_t = max(m_{t-1} + log_decay_t, x_t) at every position of `x` (b, t, ...).

    `log_decay` has the shape of `x`, `initial` is (b, ...). No gradient is meant to go through.
    """
    decays = log_decay, log_decay
    (maxima,), _ = _recurrence(decays, [x], [initial], reverse=False, algebra=_MAXIMA)
    return maxima


def running_sums(
    log_decay: Any, increments: Sequence[Any], initial: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """S_t = e^log_decay_t S_{t-1} + increment_t at every position, for several S at once.

    Args:
        log_decay: (b, t, ..., 1), at most 0, shared by all S and along their last axis. Its sum
            over a chunk, and not a product of rounded factors, decays what goes from one chunk to
            the next: a factor of e^-0.000001 rounds to one of three per cent less.
        increments: a list of (b, t, ..., features).
        initial: a list of (b, ..., features), the sums before the first position.

    Returns:
        The sums at every position, shaped as `increments`, and those after the last, as `initial`.
    """
    results = _running_sums(len(increments))(log_decay, *increments, *initial)
    return results[: len(increments)], results[len(increments) :]


def _running_sums(count: int) -> Any:
    @ops.custom_gradient
    def running_sums(log_decay: Any, *arguments: Any) -> Any:
        initial = arguments[count:]
        decays = log_decay, ops.exp(log_decay)
        sums, final = _recurrence(decays, arguments[:count], initial, reverse=False)

        def grad(*upstream: Any) -> tuple[Any, ...]:
            upstream = unpack_upstream(upstream)
            # A position passes the gradient that it receives to its increment and, decayed, to
            # the position before it. So the gradients are the same recurrence backwards, with the
            # decay of the position after.
            _, decay = decays
            after = [
                ops.concatenate([x[:, 1:], ops.full_like(x[:, :1], one)], axis=1)
                for x, one in zip(decays, (0.0, 1.0), strict=True)
            ]
            gradients, _ = _recurrence(after, upstream[:count], upstream[count:], reverse=True)
            d_initial = [decay[:, 0] * gradient[:, 0] for gradient in gradients]
            first = sum(_dot(g[:, :1], s[:, None]) for g, s in zip(gradients, initial, strict=True))
            later = sum(_dot(g[:, 1:], s[:, :-1]) for g, s in zip(gradients, sums, strict=True))
            d_log_decay = decay * ops.concatenate([first, later], axis=1)
            return d_log_decay, *gradients, *d_initial

        return (*sums, *final), grad

    return running_sums


def _dot(x: Any, y: Any) -> Any:
    return ops.sum(x * y, axis=-1, keepdims=True)


def _recurrence(
    decays: Sequence[Any],
    increments: Sequence[Any],
    initial: Sequence[Any],
    reverse: bool,
    algebra: Algebra = _SUMS,
) -> tuple[list[Any], list[Any]]:
    """The results at every position, and the last; `decays` are log_decay and decay."""
    time = ops.shape(decays[0])[1]
    log_decay, decay = _split(decays[0]), _split(decays[1], padding=algebra.one)
    increments = [_split(x, padding=algebra.zero) for x in increments]
    num_chunks, chunk_size = ops.shape(decay)[1:3]

    def position(sums: Sequence[Any], index: Any) -> list[Any]:
        factor = ops.take(decay, index, axis=2)
        return [
            algebra.plus(algebra.times(factor, s), ops.take(x, index, axis=2))
            for s, x in zip(sums, increments, strict=True)
        ]

    def from_zero(index: Any, sums: Sequence[Any]) -> list[Any]:
        return position(sums, chunk_size - 1 - index if reverse else index)

    def from_start(sums: Sequence[Any], index: Any) -> tuple[list[Any], list[Any]]:
        sums = position(sums, index)
        return sums, sums

    if isinstance(num_chunks, int) and num_chunks == 1:
        starts = [x[:, None] for x in initial]
    else:
        zeros = [ops.full_like(x[:, :, 0], algebra.zero) for x in increments]
        added = repeat(from_zero, zeros, chunk_size)
        whole = algebra.from_log(ops.sum(log_decay, axis=2))
        starts = _across_chunks(whole, added, initial, reverse, algebra)
    ends, sums = scan(from_start, starts, chunk_size, reverse)
    return [merge_axis(ops.moveaxis(x, 0, 2), time, axis=1) for x in sums], [x[:, -1] for x in ends]


def _across_chunks(
    decay: Any, added: Sequence[Any], initial: Sequence[Any], reverse: bool, algebra: Algebra
) -> list[Any]:
    """The sums before each chunk, from the decay over every chunk and what it has added."""

    def advance(sums: Sequence[Any], chunk: Any) -> tuple[list[Any], Sequence[Any]]:
        factor = ops.take(decay, chunk, axis=1)
        return [
            algebra.plus(algebra.times(factor, s), ops.take(x, chunk, axis=1))
            for s, x in zip(sums, added, strict=True)
        ], sums

    _, starts = scan(advance, list(initial), ops.shape(decay)[1], reverse)
    return [ops.moveaxis(x, 0, 1) for x in starts]


def _split(x: Any, padding: float = 0.0) -> Any:
    """(b, t, ...) to (b, n, c, ...), the last chunk filled up with `padding`."""
    return split_axis(x, fit_chunk_size(_CHUNK_SIZE, ops.shape(x)[1]), axis=1, padding=padding)
