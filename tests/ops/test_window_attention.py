"""window_attention against the softmax over all pairs, with a mask made pair by pair."""

from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from elita_tf.ops.window_attention import real_last, take_rows, window_attention
from tests import helpers
from tests.helpers import BATCH, HEADS, VALUE_DIM

# Eight chunks, the last one not full, and half a chunk.
LONG, WINDOW = 1021, 67


def spread_of(kind: str, time: int, past: int) -> tuple[np.ndarray | None, np.ndarray]:
    """Which positions of the past and of `time` are real, and how many each query sees."""
    rng = np.random.default_rng(time)
    rows = np.ones((BATCH, past + time), "bool")
    if kind == "left":
        rows[0, :300], rows[1, :77] = False, False
    elif kind == "right":
        rows[0, -300:], rows[1, -77:] = False, False
    elif kind in ("holes", "segments in holes"):
        rows[:, past:] = rng.random((BATCH, time)) < 0.4
        rows[1, past + time // 2 : past + time // 2 + 200] = False
    # A state that is not yet full has no keys in front.
    rows[:, : past // 3] = False
    seen = np.cumsum(rows, axis=1)[:, past:]
    if kind.startswith("segments"):
        starts = (rng.random((BATCH, time)) < 0.02) & rows[:, past:]
        before = np.maximum.accumulate(np.where(starts, seen - 1, 0), axis=1)
        seen = seen - before
    masked = kind not in ("none", "segments")
    return rows if masked else None, np.minimum(seen, WINDOW).astype("int32")


def make_inputs(time: int, past: int) -> list[np.ndarray]:
    rng = np.random.default_rng(time + past)
    query = rng.standard_normal((BATCH, time, HEADS, VALUE_DIM))
    return [query, *rng.standard_normal((2, BATCH, past + time, HEADS, VALUE_DIM))]


def all_pairs(query: Any, key: Any, value: Any, seen: np.ndarray, real: np.ndarray | None) -> Any:
    """The definition; 0 where a query is not real."""
    time = seen.shape[1]
    if real is None:
        real = np.ones(key.shape[:2], "bool")
    visible = np.zeros((*seen.shape, real.shape[1]), "bool")
    for row, kept in enumerate(real):
        places = np.flatnonzero(kept)
        for rank, place in enumerate(places):
            query_place = place - (len(kept) - time)
            if query_place >= 0:
                first = max(rank + 1 - seen[row, query_place], 0)
                visible[row, query_place, places[first : rank + 1]] = True
    scores = ops.einsum("bthv,bshv->bhts", query, key)
    scores = ops.where(visible[:, None], scores, -1e30)
    exponentials = ops.exp(scores - ops.max(scores, axis=-1, keepdims=True))
    weights = exponentials / ops.sum(exponentials, axis=-1, keepdims=True)
    outputs = ops.einsum("bhts,bshv->bthv", weights, value)
    return ops.where(real[:, -time:, None, None], outputs, 0.0)


def in_windows(query: Any, key: Any, value: Any, seen: np.ndarray, real: np.ndarray | None) -> Any:
    outputs = window_attention(query, key, value, seen, WINDOW, real)
    return outputs if real is None else ops.where(real[:, -seen.shape[1] :, None, None], outputs, 0)


@pytest.mark.parametrize(
    ("kind", "past"),
    [
        ("none", 0),
        ("left", 0),
        ("right", WINDOW),
        ("holes", WINDOW),
        ("segments", 0),
        ("segments in holes", WINDOW),
    ],
)
def test_the_same_as_all_pairs(kind: str, past: int) -> None:
    real, seen = spread_of(kind, LONG, past)
    inputs = make_inputs(LONG, past)
    cotangents = helpers.random_like(inputs[:1])
    options = {"seen": seen, "real": real}
    expected = helpers.vjp(partial(all_pairs, **options), inputs, cotangents)
    received = helpers.vjp(partial(in_windows, **options), inputs, cotangents)
    helpers.assert_close(received, expected, 1e-10)
    assert seen.max() == WINDOW and expected.outputs[0][:, -400:].any()


@pytest.mark.parametrize("time", [1, 5, WINDOW, WINDOW + 1, 128, 129])
@pytest.mark.parametrize(
    ("kind", "past"), [("none", 0), ("none", WINDOW), ("segments in holes", WINDOW)]
)
def test_any_length(time: int, kind: str, past: int) -> None:
    real, seen = spread_of(kind, time, past)
    inputs = make_inputs(time, past)
    expected = all_pairs(*map(ops.convert_to_tensor, inputs), seen, real)
    # JAX may attend in float32 up to a window.
    bound = 1e-6 if helpers.BACKEND == "jax" and time <= WINDOW else 1e-10
    received = helpers.jitted(in_windows)(*inputs, seen, real)
    helpers.assert_close(helpers.leaves(received), helpers.leaves(expected), bound)


def test_compiled_by_xla() -> None:
    real, seen = spread_of("segments", 300, WINDOW)
    inputs = make_inputs(300, WINDOW)
    cotangents = helpers.random_like(inputs[:1])
    expected = helpers.vjp(partial(all_pairs, seen=seen, real=real), inputs, cotangents)
    function = partial(in_windows, seen=seen, real=real)
    helpers.assert_close(helpers.vjp(function, inputs, cotangents, helpers.xla), expected, 1e-10)


@helpers.tensorflow_only
@pytest.mark.parametrize(
    ("kind", "compiled"),
    [("none", False), ("segments in holes", False), ("segments in holes", True)],
)
def test_one_graph_for_every_length(kind: str, compiled: bool) -> None:
    import tensorflow as tf

    def function(query: Any, key: Any, value: Any, seen: Any, real: Any, cotangent: Any) -> tuple:
        with tf.GradientTape() as tape:
            tape.watch([query, key, value])
            outputs = window_attention(
                query, key, value, seen, WINDOW, None if kind == "none" else real
            )
        return outputs, *tape.gradient(outputs, [query, key, value], output_gradients=cotangent)

    spec = tf.TensorSpec([None, None, HEADS, VALUE_DIM], "float64")
    flags = tf.TensorSpec([None, None], "int32"), tf.TensorSpec([None, None], "bool")
    traced = tf.function(
        function, input_signature=[spec, spec, spec, *flags, spec], jit_compile=compiled
    )
    sizes = [(300, WINDOW)]
    sizes += [] if compiled else [(1, 0), (5, WINDOW), (WINDOW, 0), (128, 0), (129, WINDOW)]
    for time, past in sizes:
        real, seen = spread_of(kind, time, past)
        inputs = make_inputs(time, past)
        kept = np.ones(seen.shape, "bool") if real is None else real[:, past:]
        cotangent = np.where(kept[:, :, None, None], helpers.random_like(inputs[:1])[0], 0.0)
        flags = np.ones((BATCH, past + time), "bool") if real is None else real
        outputs, *gradients = helpers.leaves(traced(*inputs, seen, flags, cotangent))
        expected = helpers.vjp(partial(all_pairs, seen=seen, real=real), inputs, [cotangent])
        helpers.assert_close(outputs[kept], expected.outputs[0][kept], 1e-10)
        helpers.assert_close(gradients, expected.gradients, 1e-10)


@helpers.tensorflow_only
@pytest.mark.parametrize("kind", ["none", "holes"])
def test_cost_is_linear_in_time(kind: str) -> None:
    costs = {}
    for time in (256, 1024):
        real, seen = spread_of(kind, time, 0)
        function = partial(window_attention, seen=seen, window=WINDOW, real=real)
        shape = (BATCH, time, HEADS, VALUE_DIM)
        costs[time] = helpers.traced_cost(function, [shape] * 3, [shape])
    assert costs[1024].operations == costs[256].operations
    assert costs[1024].largest <= 4 * costs[256].largest < 1024**2


@helpers.tensorflow_only
@pytest.mark.parametrize(("time", "loops"), [(1, False), (WINDOW, False), (WINDOW + 1, True)])
def test_there_is_no_loop_up_to_a_window(time: int, loops: bool) -> None:
    import tensorflow as tf

    _, seen = spread_of("none", time, WINDOW)
    function = tf.function(partial(window_attention, seen=seen, window=WINDOW))
    graph = function.get_concrete_function(*make_inputs(time, WINDOW)).graph
    assert any("While" in node.type for node in graph.get_operations()) == loops


@pytest.mark.parametrize("position", [0, 127, 128, 201])
def test_an_output_depends_on_the_window_before_only(position: int) -> None:
    _, seen = spread_of("none", 300, 0)
    inputs = [x.astype("float32") for x in make_inputs(300, 0)]
    changed = [x.copy() for x in inputs]
    for x in changed[1:]:
        x[:, position] += 50.0
    call = helpers.jitted(partial(window_attention, seen=seen, window=WINDOW))
    before, after = helpers.leaves([call(*inputs), call(*changed)])
    differs = (before != after).any(axis=(0, 2, 3))
    assert np.array_equal(np.flatnonzero(differs), np.arange(position, min(position + WINDOW, 300)))


def test_real_last_keeps_the_order_of_both_kinds() -> None:
    real = np.array([[True, False, True, False, False], [False, True, True, True, True]])
    order = real_last(real)
    assert np.array(order).tolist() == [[1, 3, 4, 0, 2], [0, 1, 2, 3, 4]]
    rows = take_rows(keras.ops.convert_to_tensor(np.arange(20.0).reshape(2, 5, 2)), order)
    assert np.array(rows)[0, :, 1].tolist() == [3.0, 7.0, 9.0, 1.0, 5.0]
