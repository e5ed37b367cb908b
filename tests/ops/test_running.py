"""Running maxima and sums against plain loops over time."""

from typing import Any

import numpy as np
import pytest

from elita_tf.ops import running
from tests import helpers
from tests.helpers import BATCH, HEADS, TIME, VALUE_DIM

TIMES = pytest.mark.parametrize("time", [1, TIME, 32, 67, 131])


@TIMES
def test_running_maximum(time: int) -> None:
    rng = np.random.default_rng(time)
    x, initial = rng.standard_normal((BATCH, time, HEADS)), rng.standard_normal((BATCH, HEADS))
    x[0, : time // 2], initial[0, 1] = -np.inf, -np.inf
    (received,) = helpers.leaves(running.running_maximum(x, initial))
    stacked = np.concatenate([initial[:, None], x], axis=1)
    assert np.array_equal(received, np.maximum.accumulate(stacked, axis=1)[:, 1:])


def loop(decay: np.ndarray, increments: list, initial: list) -> tuple[list, list]:
    """The definition."""
    sums, rows = list(initial), []
    for t in range(decay.shape[1]):
        sums = [decay[:, t] * s + x[:, t] for s, x in zip(sums, increments, strict=True)]
        rows.append(sums)
    return [np.stack(column, axis=1) for column in zip(*rows, strict=True)], sums


def loop_gradients(decay: np.ndarray, d_sums: list, d_final: list) -> tuple[list, list]:
    """Of increments and initial sums, back from the last position."""
    carried, rows = list(d_final), []
    for t in reversed(range(decay.shape[1])):
        received = [c + x[:, t] for c, x in zip(carried, d_sums, strict=True)]
        carried = [decay[:, t] * x for x in received]
        rows.insert(0, received)
    return [np.stack(column, axis=1) for column in zip(*rows, strict=True)], carried


@TIMES
def test_running_sums_and_their_gradients(time: int) -> None:
    rng = np.random.default_rng(time)
    decay = rng.random((BATCH, time, HEADS, 1))
    decay[:, time // 3] = 0.0
    widths = (VALUE_DIM, 1)
    increments = [rng.standard_normal((BATCH, time, HEADS, width)) for width in widths]
    initial = [rng.standard_normal((BATCH, HEADS, width)) for width in widths]

    def sums(increments: Any, initial: Any) -> Any:
        return running.running_sums(decay, increments, initial)

    expected = loop(decay, increments, initial)
    cotangents = helpers.random_like(expected)
    received = helpers.vjp(sums, [increments, initial], cotangents)
    helpers.assert_close(received.outputs, [*expected[0], *expected[1]], 1e-14)
    d_increments, d_initial = loop_gradients(decay, cotangents[:2], cotangents[2:])
    helpers.assert_close(received.gradients, [*d_increments, *d_initial], 1e-14)
