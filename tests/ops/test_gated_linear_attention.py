"""gated_linear_attention and its recurrence against the equation, gradients and one another."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.ops import (
    gated_linear_attention,
    gated_linear_attention_recurrent,
    gated_linear_attention_step,
)
from tests import helpers, oracles
from tests.helpers import BATCH, CHUNK, HEADS, KEY_DIM, TIME, VALUE_DIM


@cache
def chunked(chunk_size: int) -> Callable:
    """The fast form by chunks of this size."""
    return partial(gated_linear_attention, chunk_size=chunk_size)


CHUNKED = chunked(CHUNK)
FORMS = pytest.mark.parametrize(
    "form",
    [gated_linear_attention, CHUNKED, gated_linear_attention_recurrent],
    ids=["chunk 64", f"chunk {CHUNK}", "recurrent"],
)


def make_state(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((BATCH, HEADS, KEY_DIM, VALUE_DIM))


def make_inputs(time: int = TIME, state: bool = False) -> list[np.ndarray]:
    """[query, key, value, log_decay] in float64, and an initial state if asked.

    Log-decays spread from -1e-3 to -10 a step, as a trained gate's do.
    """
    rng = np.random.default_rng(time)
    query, key = rng.standard_normal((2, BATCH, time, HEADS, KEY_DIM))
    value = rng.standard_normal((BATCH, time, HEADS, VALUE_DIM))
    log_decay = -(10.0 ** rng.uniform(-3, 1, (BATCH, time, HEADS, KEY_DIM)))
    inputs = [query, key, value, log_decay]
    return [*inputs, make_state()] if state else inputs


def extreme_inputs(kind: str, time: int = 71) -> list[np.ndarray]:
    """Inputs with log-decays at the edges of what the operation promises."""
    inputs = make_inputs(time, state=True)
    rng, shape = np.random.default_rng(3), inputs[3].shape
    log_decay = {
        "wide": -(10.0 ** rng.uniform(-6, 4, shape)),
        "all slow": np.full(shape, -1e-6),
        "all fast": np.full(shape, -1e4),
        "none": np.zeros(shape),
        "rare resets": np.where(rng.random(shape) < 0.05, -1e4, -1e-3),
        "rare forgetting": np.where(rng.random(shape) < 0.05, -np.inf, -1e-3),
        "steady": np.full(shape, -1.5),
        "steep": np.full(shape, -6.0),
    }
    if kind == "all forgets at single steps":
        inputs[3][:, [0, 5, 63, 64, time - 1]] = -np.inf
    else:
        inputs[3] = log_decay[kind]
    return inputs


EXTREMES = pytest.mark.parametrize(
    "kind",
    ["wide", "all slow", "all fast", "none", "rare resets", "rare forgetting", "steady", "steep"]
    + ["all forgets at single steps"],
)


def assert_matches_oracle(
    form: Callable, inputs: list, bound: float, transform: Callable | None = None
) -> None:
    exact = [x.astype("float64") for x in helpers.leaves(inputs)]
    expected = oracles.gated_linear_attention(*exact)
    cotangents = helpers.random_like(expected)
    transform = transform or helpers.graph_of(form, inputs)
    result = helpers.vjp(form, inputs, cotangents, transform)
    helpers.assert_close(result.outputs, list(expected), bound)
    gradients = oracles.gated_linear_attention_gradients(exact, cotangents)
    helpers.assert_close(result.gradients, gradients, bound)
    helpers.assert_finite(result.gradients)


@FORMS
def test_three_positions_by_hand(form: Callable) -> None:
    query = [[1.0, 0.5], [-0.3, 2.0], [0.7, -1.1]]
    key = [[0.2, -0.4], [1.5, 0.1], [-0.6, 0.9]]
    log_decay = [[-0.1, -2.0], [-0.5, -0.01], [-1.0, -0.3]]
    value = [3.0, -1.0, 2.0]
    state, expected = [0.0, 0.0], []
    for t in range(3):
        for k in range(2):
            state[k] = np.exp(log_decay[t][k]) * state[k] + key[t][k] * value[t]
        expected.append(2**-0.5 * (query[t][0] * state[0] + query[t][1] * state[1]))
    arrays = [np.reshape(x, (1, 3, 1, -1)).astype("float64") for x in (query, key, value)]
    outputs, final = form(*arrays, np.reshape(log_decay, (1, 3, 1, 2)))
    helpers.assert_close(helpers.leaves(outputs)[0].ravel(), np.array(expected), 1e-14)
    helpers.assert_close(helpers.leaves(final)[0].ravel(), np.array(state), 1e-14)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 3, 4, 5, 64])
@pytest.mark.parametrize("time", [1, 3, TIME, 67])
def test_values_and_gradients_are_exact(time: int, chunk_size: int, state: bool) -> None:
    inputs = make_inputs(time, state)
    assert_matches_oracle(chunked(chunk_size), inputs, 1e-10, transform=helpers.jitted)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("time", [1, TIME, 67])
def test_the_definition_is_the_equation(time: int, state: bool) -> None:
    assert_matches_oracle(gated_linear_attention_recurrent, make_inputs(time, state), 1e-10)


@pytest.mark.parametrize(("time", "chunk_size"), [(TIME, CHUNK), (131, 64), (128, 16)])
def test_fast_form_equals_the_definition(time: int, chunk_size: int) -> None:
    inputs = make_inputs(time, state=True)
    cotangents = helpers.random_like(oracles.gated_linear_attention(*inputs))
    fast = partial(gated_linear_attention, chunk_size=chunk_size)
    definition = helpers.vjp(gated_linear_attention_recurrent, inputs, cotangents)
    helpers.assert_close(helpers.vjp(fast, inputs, cotangents), definition, 1e-10)


@FORMS
def test_scale(form: Callable) -> None:
    inputs = make_inputs(state=True)
    expected = oracles.gated_linear_attention(*inputs, scale=0.3)
    cotangents = helpers.random_like(expected)
    result = helpers.vjp(partial(form, scale=0.3), inputs, cotangents)
    helpers.assert_close(result.outputs, list(expected), 1e-10)
    gradients = oracles.gated_linear_attention_gradients(inputs, cotangents, scale=0.3)
    helpers.assert_close(result.gradients, gradients, 1e-10)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_a_step_is_one_position_of_the_recurrence(scale: float | None) -> None:
    inputs, state = make_inputs(), make_state()
    expected, final = gated_linear_attention_recurrent(*inputs, state, scale=scale)
    for t in range(TIME):
        position = [x[:, t] for x in inputs]
        outputs, state = gated_linear_attention_step(*position, state, scale=scale)
        helpers.assert_close(helpers.leaves(outputs), helpers.leaves(expected[:, t]), 1e-14)
    helpers.assert_close(helpers.leaves(state), helpers.leaves(final), 1e-14)


@pytest.mark.parametrize("split", [(1, 12), (6, 7), (1, 1, 11), (4, 5, 3, 1), (64, 67), (100, 31)])
def test_pieces_chained_through_the_state_are_the_whole(split: tuple[int, ...]) -> None:
    chunk_size = CHUNK if sum(split) == TIME else 64

    def chained(*arguments: Any) -> tuple:
        *inputs, state = arguments
        pieces, start = [], 0
        for length in split:
            piece = [x[:, start : start + length] for x in inputs]
            outputs, state = gated_linear_attention(*piece, state, chunk_size=chunk_size)
            pieces.append(outputs)
            start += length
        return keras.ops.concatenate(pieces, axis=1), state

    inputs = make_inputs(sum(split), state=True)
    assert_matches_oracle(chained, inputs, 1e-10, transform=helpers.jitted)


@FORMS
@EXTREMES
def test_extremes_are_exact_and_finite(form: Callable, kind: str) -> None:
    assert_matches_oracle(form, extreme_inputs(kind), 1e-10)


@EXTREMES
@pytest.mark.parametrize("form", [gated_linear_attention, CHUNKED], ids=["chunk 64", "chunk 4"])
def test_float32_extremes(form: Callable, kind: str) -> None:
    inputs = [x.astype("float32") for x in extreme_inputs(kind)]
    assert_matches_oracle(form, inputs, 3e-5)


@FORMS
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-5), ("bfloat16", 1e-2)])
def test_low_precision_inputs(form: Callable, dtype: str, bound: float) -> None:
    low = helpers.cast(make_inputs(67), dtype)
    assert_matches_oracle(form, low, bound)
    outputs, state = form(*low)
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    assert keras.backend.standardize_dtype(state.dtype) == "float32"


@FORMS
@pytest.mark.parametrize("position", [1, 6, 8, 64])
def test_no_output_depends_on_a_later_position(form: Callable, position: int) -> None:
    inputs = [x.astype("float32") for x in make_inputs(67)]
    outputs = helpers.outputs_of(form)
    before = outputs(*inputs)
    for log_decay in (-1e-6, -1e4, -np.inf):
        changed = [x.copy() for x in inputs]
        for x in changed[:3]:
            x[:, position] += 100.0
        changed[3][:, position] = log_decay
        after = outputs(*changed)
        assert np.array_equal(before[:, :position], after[:, :position])
        assert not np.array_equal(before[:, position], after[:, position])


@pytest.mark.long
@helpers.tensorflow_only
def test_one_graph_serves_every_batch_and_length() -> None:
    inputs = make_inputs(state=True)
    sizes, outputs = {BATCH, TIME}, oracles.gated_linear_attention(*inputs)
    run = helpers.dynamic_vjp(CHUNKED, inputs, outputs, sizes)
    for time in (1, CHUNK, TIME, 67):
        inputs = make_inputs(time, state=True)
        cotangents = helpers.random_like(oracles.gated_linear_attention(*inputs))
        expected = helpers.vjp(CHUNKED, inputs, cotangents)
        helpers.assert_close(run(inputs, cotangents), expected, 1e-12)


@pytest.mark.long
def test_compiled_by_xla() -> None:
    form, inputs = gated_linear_attention, extreme_inputs("rare forgetting")
    assert_matches_oracle(form, inputs, 1e-10, transform=helpers.xla)


@helpers.tensorflow_only
def test_cost_is_linear_in_time() -> None:
    costs = {}
    for time in (256, 1024):
        # Wide enough that TensorFlow does not fold the zeros of the shorter length (under 1,000
        # elements) into constants, which are other operations.
        shapes = [(4, time, HEADS, 24)] * 2 + [(4, time, HEADS, VALUE_DIM), (4, time, HEADS, 24)]
        outputs = [shapes[2], (4, HEADS, 24, VALUE_DIM)]
        costs[time] = helpers.traced_cost(gated_linear_attention, shapes, outputs)
    assert costs[1024].operations == costs[256].operations
    assert costs[1024].largest <= 4 * costs[256].largest


@pytest.mark.parametrize("chunk_size", [0, -3])
def test_chunk_size_must_be_positive(chunk_size: int) -> None:
    with pytest.raises(ValueError, match=str(chunk_size)):
        gated_linear_attention(*make_inputs(), chunk_size=chunk_size)
