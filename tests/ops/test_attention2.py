"""attention2 and attention2_recurrent against the equation, its gradients and one another."""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.ops import Attention2State, attention2, attention2_recurrent, attention2_step
from tests import helpers, oracles
from tests.helpers import BATCH, HEADS, TIME, VALUE_DIM

FORMS = pytest.mark.parametrize("form", [attention2, attention2_recurrent])
SPLITS = [(1, 12), (6, 7), (1, 1, 11), (4, 5, 3, 1)]
LONG_SPLITS = [(1, 130), (64, 67), (100, 31)]


def make_state(seed: int = 1) -> Attention2State:
    rng = np.random.default_rng(seed)
    return Attention2State(
        rng.standard_normal((BATCH, HEADS)),
        rng.standard_normal((BATCH, HEADS, VALUE_DIM)),
        rng.random((BATCH, HEADS)) + 0.5,
    )


def make_inputs(time: int = TIME, spread: float = 2.0, state: bool = False) -> list:
    """[key_logits, query_logits, self_logits, value] in float64, and an initial state if asked."""
    rng = np.random.default_rng(time)
    inputs = [spread * rng.standard_normal((BATCH, time, HEADS)) for _ in range(3)]
    inputs.append(rng.standard_normal((BATCH, time, HEADS, VALUE_DIM)))
    return inputs + [make_state()] if state else inputs


def extreme_inputs(kind: str) -> list:
    """Inputs of 40 positions at the edges of what the operation promises."""
    inputs = make_inputs(40)
    key, query, own, _ = inputs
    if kind == "wide":
        key[:] = np.random.default_rng(2).uniform(-1e4, 1e4, key.shape)
    elif kind == "rising":
        key[:] += np.linspace(-1e4, 1e4, 40)[:, None]
    elif kind == "falling":
        key[:] += np.linspace(1e4, -1e4, 40)[:, None]
    elif kind == "all logits":
        for logits in (key, query, own):
            logits *= 5e3
    elif kind == "dropped start":
        key[:, :17] = -np.inf
    elif kind == "dropped middle":
        key[:, 5:9], key[:, 30] = -np.inf, -np.inf
    elif kind == "all dropped":
        key[:] = -np.inf
    elif kind == "dropped and wide":
        key[:] = np.random.default_rng(2).uniform(-1e4, 1e4, key.shape)
        key[:, :3], key[:, 20:37] = -np.inf, -np.inf
    elif kind == "nothing kept, loud query":
        key[:, :17], query[:] = -np.inf, 1e4
    return inputs


EXTREMES = pytest.mark.parametrize(
    "kind",
    ["wide", "rising", "falling", "all logits", "dropped start", "dropped middle", "all dropped"]
    + ["dropped and wide", "nothing kept, loud query"],
)


def assert_matches_oracle(
    form: Callable, inputs: list, bound: float, extreme: bool = False, **options: Any
) -> None:
    exact = [x.astype("float64") for x in helpers.leaves(inputs[:4])] + list(inputs[4:])
    expected = oracles.attention2(*exact)
    cotangents = helpers.random_like(expected)
    # The maximum of nothing is a tie of -inf, where backends share a gradient out at will.
    cotangents[1] = np.where(np.isneginf(expected[1][0]), 0.0, cotangents[1])
    result = helpers.vjp(form, inputs, cotangents, **options)
    helpers.assert_close(result.outputs, keras.tree.flatten(expected), bound)
    compare = helpers.assert_jointly_close if extreme else helpers.assert_close
    compare(result.gradients, oracles.attention2_gradients(exact, cotangents), bound)
    if extreme:
        helpers.assert_finite([result.outputs[0], *result.outputs[2:], *result.gradients])


@FORMS
def test_three_positions_by_hand(form: Callable) -> None:
    key, query, own, value = [0.5, -1.0, 2.0], [0.3, 0.1, -0.7], [1.1, -0.4, 0.2], [2.0, 3.0, -5.0]
    expected = []
    for i in range(3):
        numerator = math.exp(own[i]) * value[i]
        denominator = math.exp(own[i])
        for j in range(i + 1):
            numerator += math.exp(query[i] + key[j]) * value[j]
            denominator += math.exp(query[i] + key[j])
        expected.append(numerator / denominator)
    logits = [np.reshape(x, (1, 3, 1)).astype("float64") for x in (key, query, own)]
    outputs, state = form(*logits, np.reshape(value, (1, 3, 1, 1)).astype("float64"))
    helpers.assert_close(helpers.leaves(outputs)[0].ravel(), np.array(expected), 1e-14)
    assert isinstance(state, Attention2State)
    maximum, numerator, denominator = (leaf.item() for leaf in helpers.leaves(state))
    sums = [math.exp(k) * v for k, v in zip(key, value, strict=True)]
    assert maximum == 2.0
    assert numerator * math.exp(maximum) == pytest.approx(sum(sums), rel=1e-14)
    assert denominator * math.exp(maximum) == pytest.approx(sum(map(math.exp, key)), rel=1e-14)


@FORMS
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("time", [1, 3, TIME, 64, 67, 131])
def test_values_and_gradients_are_exact(form: Callable, time: int, state: bool) -> None:
    assert_matches_oracle(form, make_inputs(time, state=state), 1e-10)


@pytest.mark.parametrize("time", [TIME, 131])
def test_fast_form_equals_the_definition(time: int) -> None:
    inputs = make_inputs(time, spread=5.0, state=True)
    cotangents = helpers.random_like(oracles.attention2(*inputs))
    fast = helpers.vjp(attention2, inputs, cotangents)
    definition = helpers.vjp(attention2_recurrent, inputs, cotangents)
    helpers.assert_close(fast, definition, 1e-10)


def test_a_step_is_one_position_of_the_recurrence() -> None:
    inputs, state = make_inputs(), make_state()
    expected, final = attention2_recurrent(*inputs, state)
    for i in range(TIME):
        outputs, state = attention2_step(*(x[:, i] for x in inputs), state)
        helpers.assert_close(helpers.leaves(outputs), helpers.leaves(expected[:, i]), 1e-14)
    helpers.assert_close(helpers.leaves(state), helpers.leaves(final), 1e-14)


@pytest.mark.parametrize("split", SPLITS + LONG_SPLITS)
def test_pieces_chained_through_the_state_are_the_whole(split: tuple[int, ...]) -> None:
    def chained(*arguments: Any) -> tuple:
        *inputs, state = arguments
        pieces, start = [], 0
        for length in split:
            outputs, state = attention2(*(x[:, start : start + length] for x in inputs), state)
            pieces.append(outputs)
            start += length
        return keras.ops.concatenate(pieces, axis=1), state

    assert_matches_oracle(chained, make_inputs(sum(split), state=True), 1e-10)


@FORMS
def test_the_state_handed_over_can_be_empty(form: Callable) -> None:
    inputs = make_inputs()
    inputs[0][:] = -np.inf
    state = form(*inputs)[1]
    later = make_inputs(7)
    fresh = form(*later)
    helpers.assert_close(helpers.leaves(form(*later, state)), helpers.leaves(fresh), 1e-14)


@FORMS
@EXTREMES
@pytest.mark.parametrize("state", [False, True])
def test_extremes_are_exact_and_finite(form: Callable, kind: str, state: bool) -> None:
    inputs = extreme_inputs(kind) + ([make_state()] if state else [])
    assert_matches_oracle(form, inputs, 1e-10, extreme=True)


@FORMS
def test_nothing_kept_returns_the_value(form: Callable) -> None:
    inputs = extreme_inputs("all dropped")
    outputs, state = form(*inputs)
    assert np.array_equal(helpers.leaves(outputs)[0], inputs[3])
    maximum, numerator, denominator = helpers.leaves(state)
    assert np.isneginf(maximum).all() and not numerator.any() and not denominator.any()


@EXTREMES
def test_float32_extremes(kind: str) -> None:
    inputs = [x.astype("float32") for x in extreme_inputs(kind)]
    assert_matches_oracle(attention2, inputs, 3e-3, extreme=True)


@FORMS
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-5), ("bfloat16", 1e-2)])
def test_low_precision_inputs(form: Callable, dtype: str, bound: float) -> None:
    low = helpers.cast(make_inputs(67), dtype)
    assert_matches_oracle(form, low, bound)
    outputs, state = form(*low)
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    assert {keras.backend.standardize_dtype(leaf.dtype) for leaf in state} == {"float32"}


@FORMS
@pytest.mark.parametrize("position", [1, 31, 32, 64])
def test_no_output_depends_on_a_later_position(form: Callable, position: int) -> None:
    inputs = [x.astype("float32") for x in make_inputs(67)]
    before = helpers.leaves(form(*inputs)[0])[0]
    for loud in (0.5, 1e4):
        changed = [x.copy() for x in inputs]
        for x in changed:
            x[:, position] += loud
        after = helpers.leaves(form(*changed)[0])[0]
        assert np.array_equal(before[:, :position], after[:, :position])
        assert not np.array_equal(before[:, position], after[:, position])


@helpers.tensorflow_only
def test_one_graph_serves_every_batch_and_length() -> None:
    inputs = make_inputs(state=True)
    sizes = {BATCH, TIME}
    run = helpers.dynamic_vjp(attention2, inputs, oracles.attention2(*inputs), sizes)
    for time in (1, TIME, 64, 131):
        inputs = make_inputs(time, state=True)
        cotangents = helpers.random_like(oracles.attention2(*inputs))
        expected = helpers.vjp(attention2, inputs, cotangents)
        helpers.assert_close(run(inputs, cotangents), expected, 1e-12)


def test_compiled_by_xla() -> None:
    assert_matches_oracle(attention2, make_inputs(67, state=True), 1e-10, transform=helpers.xla)


@helpers.tensorflow_only
def test_cost_is_linear_in_time() -> None:
    costs = {}
    for time in (256, 1024):
        # Wide enough that TensorFlow does not fold the zeros of the shorter length (under 1,000
        # elements) into constants, which are other operations.
        batch, value_dim = 4, 24
        shapes = [(batch, time, HEADS)] * 3 + [(batch, time, HEADS, value_dim)]
        outputs = [shapes[3], (batch, HEADS), (batch, HEADS, value_dim), (batch, HEADS)]
        costs[time] = helpers.traced_cost(attention2, shapes, outputs)
    assert costs[1024].operations == costs[256].operations
    assert costs[1024].largest <= 4 * costs[256].largest
