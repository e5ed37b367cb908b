"""Running maxima and sums against plain loops over time."""

import numpy as np
import pytest

from elita_tf.ops import running
from tests import helpers
from tests.helpers import BATCH, HEADS, KEY_DIM, TIME, VALUE_DIM

TIMES = pytest.mark.parametrize("time", [1, TIME, 32, 67, 131])


@TIMES
def test_running_maximum(time: int) -> None:
    rng = np.random.default_rng(time)
    x, initial = rng.standard_normal((BATCH, time, HEADS)), rng.standard_normal((BATCH, HEADS))
    x[0, : time // 2], initial[0, 1] = -np.inf, -np.inf
    (received,) = helpers.leaves(running.running_maximum(x, initial))
    stacked = np.concatenate([initial[:, None], x], axis=1)
    assert np.array_equal(received, np.maximum.accumulate(stacked, axis=1)[:, 1:])


@TIMES
def test_decayed_maximum(time: int) -> None:
    rng = np.random.default_rng(time)
    x, initial = rng.standard_normal((BATCH, time, HEADS)), rng.standard_normal((BATCH, HEADS))
    decay = -rng.random((BATCH, time, HEADS))
    x[0, : time // 2], initial[0, 1], decay[1, time // 3] = -np.inf, -np.inf, -np.inf
    maximum, expected = initial, []
    for t in range(time):
        maximum = np.maximum(maximum + decay[:, t], x[:, t])
        expected.append(maximum)
    received = helpers.leaves(running.decayed_maximum(x, initial, decay))
    helpers.assert_close(received, [np.stack(expected, axis=1)], 1e-14)


def loop(decay: np.ndarray, increments: list, initial: list) -> tuple[list, list]:
    """The definition."""
    sums, rows = list(initial), []
    for t in range(decay.shape[1]):
        sums = [decay[:, t] * s + x[:, t] for s, x in zip(sums, increments, strict=True)]
        rows.append(sums)
    return [np.stack(column, axis=1) for column in zip(*rows, strict=True)], sums


def loop_gradients(
    decay: np.ndarray, sums: list, initial: list, d_sums: list, d_final: list
) -> tuple[np.ndarray, list, list]:
    """Of the decay, the increments and the initial sums, back from the last position."""
    carried, rows, d_decay = list(d_final), [], np.zeros_like(decay)
    for t in reversed(range(decay.shape[1])):
        received = [c + x[:, t] for c, x in zip(carried, d_sums, strict=True)]
        before = [s[:, t - 1] for s in sums] if t else initial
        for x, s in zip(received, before, strict=True):
            d_decay[:, t] += (x * s).sum(axis=-1, keepdims=True)
        carried = [decay[:, t] * x for x in received]
        rows.insert(0, received)
    return d_decay, [np.stack(column, axis=1) for column in zip(*rows, strict=True)], carried


@TIMES
@pytest.mark.parametrize("inner", [(HEADS,), (HEADS, KEY_DIM)])
def test_running_sums_and_their_gradients(time: int, inner: tuple[int, ...]) -> None:
    rng = np.random.default_rng(time)
    decay = rng.random((BATCH, time, *inner, 1))
    decay[:, time // 3] = 0.0
    widths = (VALUE_DIM, 1)
    increments = [rng.standard_normal((BATCH, time, *inner, width)) for width in widths]
    initial = [rng.standard_normal((BATCH, *inner, width)) for width in widths]
    expected = loop(decay, increments, initial)
    cotangents = helpers.random_like(expected)
    with np.errstate(divide="ignore"):
        log_decay = np.log(decay)
    received = helpers.vjp(running.running_sums, [log_decay, increments, initial], cotangents)
    helpers.assert_close(received.outputs, [*expected[0], *expected[1]], 1e-14)
    d_decay, d_increments, d_initial = loop_gradients(
        decay, expected[0], initial, cotangents[:2], cotangents[2:]
    )
    helpers.assert_close(received.gradients, [decay * d_decay, *d_increments, *d_initial], 1e-14)
