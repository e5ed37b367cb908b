"""attention2 and attention2_recurrent against the equation, its gradients and one another."""

import math
from collections.abc import Callable
from functools import cache
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
# Of every position of every head: what is left of all before it.
DECAYS: dict[str, Callable[[np.random.Generator, tuple], np.ndarray]] = {
    "slight": lambda rng, shape: np.full(shape, -1e-6),
    "mixed": lambda rng, shape: -np.exp(rng.uniform(np.log(1e-6), np.log(30.0), shape)),
    "rarely strong": lambda rng, shape: np.where(rng.random(shape) < 0.05, -1e4, -1e-3),
    "strong": lambda rng, shape: np.full(shape, -1e4),
    "forgetting": lambda rng, shape: np.where(rng.random(shape) < 0.2, -np.inf, -0.1),
    "forgetting all": lambda rng, shape: np.full(shape, -np.inf),
}
DECAYED = pytest.mark.parametrize("decay", [None, "mixed"])


EXTREMES = pytest.mark.parametrize(
    "kind",
    ["wide", "rising", "falling", "all logits", "dropped start", "dropped middle", "all dropped"]
    + ["dropped and wide", "nothing kept, loud query"],
)
# Every extreme of the logits with a rare strong decay or forgetting, and every decay at its widest.
EXTREMES_WITH_DECAYS = pytest.mark.parametrize(
    ("kind", "decay"),
    [
        ("rising", "rarely strong"),
        ("falling", "rarely strong"),
        ("falling", "forgetting"),
        ("all logits", "forgetting"),
        ("dropped start", "rarely strong"),
        ("dropped middle", "forgetting"),
        ("all dropped", "forgetting"),
        ("dropped and wide", "rarely strong"),
        ("nothing kept, loud query", "forgetting"),
        *[("wide", decay) for decay in DECAYS],
    ],
)


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


def make_decay(kind: str | None, time: int) -> np.ndarray | None:
    """log_decay (batch, time, heads) of one of `DECAYS`, in float64."""
    return kind and DECAYS[kind](np.random.default_rng(5), (BATCH, time, HEADS))


@cache
def decayed(form: Callable) -> Callable:
    """The form with log_decay as its last argument."""
    return lambda *arguments: form(*arguments[:-1], log_decay=arguments[-1])


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


def assert_matches_oracle(
    form: Callable,
    inputs: list,
    bound: float,
    decay: np.ndarray | None = None,
    extreme: bool = False,
    transform: Callable | None = None,
) -> None:
    exact = [x.astype("float64") for x in helpers.leaves(inputs[:4])] + list(inputs[4:])
    log_decay = None if decay is None else helpers.leaves(decay)[0].astype("float64")
    expected = oracles.attention2(*exact, log_decay=log_decay)
    cotangents = helpers.random_like(expected)
    # The maximum of nothing is a tie of -inf, where backends share a gradient out at will.
    cotangents[1] = np.where(np.isneginf(expected[1][0]), 0.0, cotangents[1])
    if decay is not None:
        form, inputs = decayed(form), [*inputs, decay]
    transform = transform or helpers.graph_of(form, inputs)
    result = helpers.vjp(form, inputs, cotangents, transform)
    helpers.assert_close(result.outputs, keras.tree.flatten(expected), bound)
    compare = helpers.assert_jointly_close if extreme else helpers.assert_close
    compare(result.gradients, oracles.attention2_gradients(exact, cotangents, log_decay), bound)
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
def test_three_decayed_positions_by_hand(form: Callable) -> None:
    key, query, own, value = [0.5, -1.0, 2.0], [0.3, 0.1, -0.7], [1.1, -0.4, 0.2], [2.0, 3.0, -5.0]
    kept = [0.9, 0.25, 0.5]
    expected = []
    for i in range(3):
        numerator = math.exp(own[i]) * value[i]
        denominator = math.exp(own[i])
        for j in range(i + 1):
            weight = math.exp(query[i] + key[j]) * math.prod(kept[j + 1 : i + 1])
            numerator += weight * value[j]
            denominator += weight
        expected.append(numerator / denominator)
    logits = [np.reshape(x, (1, 3, 1)).astype("float64") for x in (key, query, own)]
    value, log_decay = np.reshape(value, (1, 3, 1, 1)), np.log(kept).reshape(1, 3, 1)
    outputs, state = form(*logits, value.astype("float64"), log_decay=log_decay)
    helpers.assert_close(helpers.leaves(outputs)[0].ravel(), np.array(expected), 1e-14)
    maximum, _, denominator = (leaf.item() for leaf in helpers.leaves(state))
    total = 0.125 * math.exp(0.5) + 0.5 * math.exp(-1.0) + math.exp(2.0)
    assert denominator * math.exp(maximum) == pytest.approx(total, rel=1e-14)


@FORMS
@DECAYED
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("time", [1, 3, TIME, 64, 67, 131])
def test_values_and_gradients_are_exact(
    form: Callable, decay: str | None, time: int, state: bool
) -> None:
    inputs = make_inputs(time, state=state)
    # A graph is quicker for what goes position by position.
    transform = helpers.jitted if form is attention2 else None
    assert_matches_oracle(form, inputs, 1e-10, make_decay(decay, time), transform=transform)


@DECAYED
@pytest.mark.parametrize("time", [TIME, 131])
def test_fast_form_equals_the_definition(decay: str | None, time: int) -> None:
    inputs = make_inputs(time, spread=5.0, state=True)
    cotangents = helpers.random_like(oracles.attention2(*inputs))
    forms = [attention2, attention2_recurrent]
    if decay is not None:
        inputs, forms = [*inputs, make_decay(decay, time)], map(decayed, forms)
    fast, definition = (helpers.vjp(form, inputs, cotangents) for form in forms)
    helpers.assert_close(fast, definition, 1e-10)


@DECAYED
def test_a_step_is_one_position_of_the_recurrence(decay: str | None) -> None:
    inputs, state, log_decay = make_inputs(), make_state(), make_decay(decay, TIME)
    expected, final = attention2_recurrent(*inputs, state, log_decay=log_decay)
    for i in range(TIME):
        own = None if log_decay is None else log_decay[:, i]
        outputs, state = attention2_step(*(x[:, i] for x in inputs), state, log_decay=own)
        helpers.assert_close(helpers.leaves(outputs), helpers.leaves(expected[:, i]), 1e-14)
    helpers.assert_close(helpers.leaves(state), helpers.leaves(final), 1e-14)


@DECAYED
@pytest.mark.parametrize("split", SPLITS + LONG_SPLITS)
def test_pieces_chained_through_the_state_are_the_whole(
    decay: str | None, split: tuple[int, ...]
) -> None:
    def chained(*arguments: Any, log_decay: Any = None) -> tuple:
        *inputs, state = arguments
        pieces, start = [], 0
        for length in split:
            piece = slice(start, start + length)
            own = None if log_decay is None else log_decay[:, piece]
            outputs, state = attention2(*(x[:, piece] for x in inputs), state, log_decay=own)
            pieces.append(outputs)
            start += length
        return keras.ops.concatenate(pieces, axis=1), state

    time = sum(split)
    inputs, log_decay = make_inputs(time, state=True), make_decay(decay, time)
    assert_matches_oracle(chained, inputs, 1e-10, log_decay, transform=helpers.jitted)


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
@EXTREMES_WITH_DECAYS
def test_extremes_with_decays_are_exact_and_finite(form: Callable, kind: str, decay: str) -> None:
    inputs = [*extreme_inputs(kind), make_state()]
    assert_matches_oracle(form, inputs, 1e-10, make_decay(decay, 40), extreme=True)


@FORMS
def test_a_dropped_position_can_still_decay(form: Callable) -> None:
    inputs, log_decay = make_inputs(), np.zeros((BATCH, TIME, HEADS))
    inputs[0][:, 1:], log_decay[:, 5] = -np.inf, np.log(0.5)
    (_, numerator, denominator), (_, halved, half) = (
        helpers.leaves(form(*inputs, log_decay=each)[1]) for each in (0 * log_decay, log_decay)
    )
    maxima = [helpers.leaves(form(*inputs, log_decay=x)[1])[0] for x in (0 * log_decay, log_decay)]
    scale = np.exp(maxima[1] - maxima[0])
    helpers.assert_close(
        [half * scale, halved * scale[..., None]], [denominator / 2, numerator / 2], 1e-14
    )


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


@EXTREMES_WITH_DECAYS
def test_float32_extremes_with_decays(kind: str, decay: str) -> None:
    inputs = [x.astype("float32") for x in extreme_inputs(kind)]
    log_decay = make_decay(decay, 40).astype("float32")
    assert_matches_oracle(attention2, inputs, 3e-3, log_decay, extreme=True)


@pytest.mark.long
def test_float32_over_ten_thousand_positions() -> None:
    bounds = {0.0: 3e-5, 1e2: 3e-5, 1e4: 3e-3}
    # Each is a row of one batch.
    cases = [(level, decay) for level in bounds for decay in (-1e-6, -1e-4, -1e-2)]
    level, decay = (np.array(x, "float32")[:, None, None] for x in zip(*cases, strict=True))
    rows = np.arange(len(cases)) % BATCH
    inputs = [x.astype("float32")[rows] for x in make_inputs(10_000, spread=0.5)]
    # The query takes the level away again, so that every output has a share of both its parts.
    inputs[0] += level
    inputs[1] -= level + 5
    inputs.append(np.broadcast_to(decay, inputs[0].shape))

    def function(*arguments: Any) -> tuple:
        """The outputs, and what the state stands for, whatever its anchor is."""
        outputs, state = attention2(*arguments[:4], log_decay=arguments[4])
        mean = state.numerator / state.denominator[..., None]
        return outputs, mean, state.max_logit + keras.ops.log(state.denominator)

    cotangents = helpers.random_like([inputs[3], inputs[3][:, 0], inputs[0][:, 0]])
    low, exact = (
        helpers.vjp(function, [x.astype(dtype) for x in inputs], cotangents)
        for dtype in ("float32", "float64")
    )
    for row, (level, _) in enumerate(cases):
        received, expected = ([x[row] for each in vjp for x in each] for vjp in (low, exact))
        helpers.assert_close(received, expected, bounds[level])


@FORMS
@DECAYED
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 3e-5), ("bfloat16", 1e-2)])
def test_low_precision_inputs(form: Callable, decay: str | None, dtype: str, bound: float) -> None:
    low, log_decay = helpers.cast(make_inputs(67), dtype), make_decay(decay, 67)
    log_decay = decay and helpers.cast(log_decay, dtype)
    assert_matches_oracle(form, low, bound, log_decay)
    outputs, state = form(*low, log_decay=log_decay)
    assert keras.backend.standardize_dtype(outputs.dtype) == dtype
    assert {keras.backend.standardize_dtype(leaf.dtype) for leaf in state} == {"float32"}


@FORMS
@DECAYED
@pytest.mark.parametrize("position", [1, 31, 32, 64])
def test_no_output_depends_on_a_later_position(
    form: Callable, decay: str | None, position: int
) -> None:
    inputs = [x.astype("float32") for x in make_inputs(67)]
    if decay is not None:
        inputs, form = [*inputs, make_decay(decay, 67).astype("float32")], decayed(form)
    outputs = helpers.outputs_of(form)
    before = outputs(*inputs)
    for loud in (-0.5, -1e4) if decay else (0.5, 1e4):
        changed = [x.copy() for x in inputs]
        for x in changed:
            x[:, position] += loud
        after = outputs(*changed)
        assert np.array_equal(before[:, :position], after[:, :position])
        assert not np.array_equal(before[:, position], after[:, position])


@pytest.mark.long
@helpers.tensorflow_only
@DECAYED
def test_one_graph_serves_every_batch_and_length(decay: str | None) -> None:
    def arguments(time: int) -> list:
        inputs = make_inputs(time, state=True)
        return inputs if decay is None else [*inputs, make_decay(decay, time)]

    form = attention2 if decay is None else decayed(attention2)
    outputs = oracles.attention2(*make_inputs(state=True))
    run = helpers.dynamic_vjp(form, arguments(TIME), outputs, {BATCH, TIME})
    for time in (1, TIME, 64, 131):
        cotangents = helpers.random_like(oracles.attention2(*make_inputs(time, state=True)))
        expected = helpers.vjp(form, arguments(time), cotangents)
        helpers.assert_close(run(arguments(time), cotangents), expected, 1e-12)


@DECAYED
def test_compiled_by_xla(decay: str | None) -> None:
    inputs, log_decay = make_inputs(67, state=True), make_decay(decay, 67)
    assert_matches_oracle(attention2, inputs, 1e-10, log_decay, transform=helpers.xla)


@helpers.tensorflow_only
@DECAYED
def test_cost_is_linear_in_time(decay: str | None) -> None:
    costs = {}
    for time in (256, 1024):
        # Wide enough that TensorFlow does not fold the zeros of the shorter length (under 1,000
        # elements) into constants, which are other operations.
        batch, value_dim = 4, 24
        shapes = [(batch, time, HEADS)] * 3 + [(batch, time, HEADS, value_dim)]
        outputs = [shapes[3], (batch, HEADS), (batch, HEADS, value_dim), (batch, HEADS)]
        if decay is None:
            costs[time] = helpers.traced_cost(attention2, shapes, outputs)
        else:
            shapes.append((batch, time, HEADS))
            costs[time] = helpers.traced_cost(decayed(attention2), shapes, outputs)
    assert costs[1024].operations == costs[256].operations
    assert costs[1024].largest <= 4 * costs[256].largest
