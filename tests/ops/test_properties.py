"""Ops on any shapes, dtypes and extreme values against the float64 loops of `tests.oracles`."""

from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elita_tf import ops
from tests import helpers, oracles
from tests.helpers import budget

SIZE, SEED = st.integers(1, 4), st.integers(0, 2**32 - 1)
TIME = st.integers(1, 17)
DTYPE = st.sampled_from(["float32", "float64"])
# What logits and log-decays are made of; several kinds may stand in one array.
LOGITS = {
    "plain": lambda rng, shape: rng.standard_normal(shape),
    "far apart": lambda rng, shape: rng.uniform(-1e4, 1e4, shape),
    "rising": lambda rng, shape: np.sort(rng.uniform(-1e4, 1e4, shape), axis=1),
    "equal": lambda rng, shape: np.full(shape, 1e4),
    "tiny": lambda rng, shape: rng.uniform(-1e-30, 1e-30, shape),
}
DECAYS = {
    "mild": lambda rng, shape: -rng.uniform(0, 1, shape),
    "none": lambda rng, shape: np.zeros(shape),
    "slight": lambda rng, shape: -rng.uniform(0, 1e-6, shape),
    "strong": lambda rng, shape: -rng.uniform(0, 1e4, shape),
    "rarely strong": lambda rng, shape: np.where(rng.random(shape) < 0.1, -1e4, -1e-3),
    "forgetting": lambda rng, shape: np.where(rng.random(shape) < 0.2, -np.inf, -0.1),
}


def rounded(dtype: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays as float64, of values that `dtype` has."""
    return [array.astype(dtype).astype("float64") for array in arrays]


def bound_of(dtype: str, *arrays: np.ndarray) -> float:
    if dtype == "float64":
        return 1e-10
    finite = [np.abs(array[np.isfinite(array)]).max(initial=0.0) for array in arrays]
    return 3e-3 if max(finite, default=0.0) > 100 else 3e-5


def assert_close(actual: Any, expected: Any, bound: float) -> None:
    """Leaf by leaf, within `bound` of the largest expectation; infinities are the same."""
    actual = [np.asarray(leaf, "float64") for leaf in helpers.leaves(actual)]
    for leaf, target in zip(actual, expected, strict=True):
        assert leaf.shape == target.shape
        same = np.isinf(target)
        np.testing.assert_array_equal(leaf[same], target[same])
        scale = np.abs(target[~same]).max(initial=1e-30)
        np.testing.assert_allclose(leaf[~same], target[~same], rtol=0, atol=bound * scale)


@st.composite
def attention2_calls(draw: st.DrawFn) -> tuple[str, list[np.ndarray], int]:
    """dtype, the four inputs, the log-decay, and where to split time."""
    batch, time, heads, value_dim = draw(SIZE), draw(TIME), draw(SIZE), draw(SIZE)
    rng = np.random.default_rng(draw(SEED))
    shape = (batch, time, heads)
    kind = st.sampled_from(sorted(LOGITS))
    logits = [LOGITS[draw(kind)](rng, shape) for _ in range(3)]
    dropped = draw(st.sampled_from([0.0, 0.3, 1.0]))
    logits[0] = np.where(rng.random(shape) < dropped, -np.inf, logits[0])
    decay = DECAYS[draw(st.sampled_from(sorted(DECAYS)))](rng, shape)
    inputs = [*logits, rng.standard_normal((*shape, value_dim)), decay]
    dtype = draw(DTYPE)
    return dtype, rounded(dtype, *inputs), draw(st.integers(1, time))


def decayed(form: Any) -> Any:
    """A form of attention2 with log_decay as its fifth argument."""
    return lambda *inputs: form(*inputs[:4], *inputs[5:], log_decay=inputs[4])


@pytest.mark.parametrize("form", ["attention2", "attention2_recurrent"])
@budget(12, 300)
@given(call=attention2_calls())
def test_attention2_is_its_definition_whole_and_in_two_pieces(form: str, call: tuple) -> None:
    dtype, inputs, split = call
    expected, state = decayed(oracles.attention2)(*inputs)
    bound = bound_of(dtype, *inputs[:3])
    op = helpers.jitted(decayed(getattr(ops, form)))
    outputs, final = op(*(x.astype(dtype) for x in inputs))
    assert_close([outputs, *final], [expected, *state], bound)
    pieces, final = [], None
    for piece in (slice(0, split), slice(split, None)):
        cut = [x[:, piece].astype(dtype) for x in inputs]
        if cut[0].shape[1]:
            outputs, final = op(*cut, final)
            pieces.append(helpers.leaves(outputs)[0])
    assert_close([np.concatenate(pieces, axis=1), *final], [expected, *state], bound)


@budget(5, 100)
@given(call=attention2_calls(), seed=SEED)
def test_gradients_of_attention2(call: tuple, seed: int) -> None:
    _, inputs, _ = call
    *inputs, decay = inputs
    outputs, state = oracles.attention2(*inputs, log_decay=decay)
    cotangents = helpers.random_like([outputs, *state], seed)
    # A maximum that two keys have, or that is minus infinity, has no one gradient.
    last = inputs[0].shape[1] - 1
    aged = np.stack(oracles.aged_logits(inputs[0], state[0], decay, last)[0])
    largest = np.abs(aged - state[0]) <= 1e-9 * np.abs(state[0])
    unique = np.logical_and(largest.sum(axis=0) == 1, np.isfinite(state[0]))
    cotangents[1:] = [
        np.where(unique if x.ndim == 2 else unique[..., None], x, 0.0) for x in cotangents[1:]
    ]
    result = helpers.vjp(decayed(ops.attention2), [*inputs, decay], cotangents)
    expected = oracles.attention2_gradients(inputs, cotangents, decay)
    helpers.assert_finite(result.gradients)
    helpers.assert_jointly_close(result.gradients, expected, 1e-9)


@st.composite
def gla_calls(draw: st.DrawFn) -> tuple[str, list[np.ndarray], dict[str, Any], int]:
    """dtype, the four inputs and an initial state, keywords, and where to split time."""
    batch, heads, key_dim, value_dim = (draw(SIZE) for _ in range(4))
    time = draw(TIME)
    rng = np.random.default_rng(draw(SEED))
    shape = (batch, time, heads)
    query, key = rng.standard_normal((2, *shape, key_dim))
    value = rng.standard_normal((*shape, value_dim))
    decay = DECAYS[draw(st.sampled_from(sorted(DECAYS)))](rng, (*shape, key_dim))
    state = draw(st.sampled_from([0.0, 1.0, 100.0])) * rng.standard_normal(
        (batch, heads, key_dim, value_dim)
    )
    dtype = draw(DTYPE)
    scale = draw(st.sampled_from([None, 0.0, 1.0, -2.5]))
    return (
        dtype,
        rounded(dtype, query, key, value, decay, state),
        {"scale": scale, "chunk_size": draw(st.integers(1, 20))},
        draw(st.integers(1, time)),
    )


@pytest.mark.parametrize("form", ["gated_linear_attention", "gated_linear_attention_recurrent"])
@budget(12, 300)
@given(call=gla_calls())
def test_gla_is_its_definition_whole_and_in_two_pieces(form: str, call: tuple) -> None:
    dtype, inputs, keywords, split = call
    expected = oracles.gated_linear_attention(*inputs, scale=keywords["scale"])
    bound = bound_of(dtype)
    if form.endswith("recurrent"):
        keywords = {"scale": keywords["scale"]}
    op = helpers.jitted(partial(getattr(ops, form), **keywords))
    outputs, final = op(*(x.astype(dtype) for x in inputs))
    assert_close([outputs, final], expected, bound)
    pieces, state = [], inputs[4].astype(dtype)
    for piece in (slice(0, split), slice(split, None)):
        cut = [x[:, piece].astype(dtype) for x in inputs[:4]]
        if cut[0].shape[1]:
            outputs, state = op(*cut, state)
            pieces.append(helpers.leaves(outputs)[0])
    assert_close([np.concatenate(pieces, axis=1), state], expected, bound)


@budget(5, 100)
@given(call=gla_calls(), seed=SEED)
def test_gradients_of_gla(call: tuple, seed: int) -> None:
    _, inputs, keywords, _ = call
    cotangents = helpers.random_like([inputs[2], inputs[4]], seed)
    expected = oracles.gated_linear_attention_gradients(inputs, cotangents, keywords["scale"])
    result = helpers.vjp(lambda *x: ops.gated_linear_attention(*x, **keywords), inputs, cotangents)
    helpers.assert_finite(result.gradients)
    helpers.assert_jointly_close(result.gradients, expected, 1e-9)


LEADING = st.lists(st.integers(1, 4), max_size=3).map(tuple)


@budget(12, 300)
@given(leading=LEADING, sizes=st.tuples(SIZE, SIZE, SIZE), seed=SEED, dtype=DTYPE)
def test_feed_forward2_on_any_leading_axes(
    leading: tuple, sizes: tuple, seed: int, dtype: str
) -> None:
    inner, rank, _ = sizes
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal(shape) for shape in ((*leading, inner), (*leading, rank), sizes)]
    arrays = rounded(dtype, *arrays)
    outputs = helpers.jitted(ops.feed_forward2)(*(x.astype(dtype) for x in arrays))
    assert_close([outputs], [oracles.feed_forward2(*arrays)], bound_of(dtype))


@budget(12, 300)
@given(
    leading=LEADING,
    sizes=st.tuples(st.integers(1, 6), SIZE),
    seed=SEED,
    dtype=DTYPE,
    magnitude=st.sampled_from([1e-3, 1.0, 100.0]),
    weights=st.sampled_from(["none", "some", "last axis", "zero"]),
)
def test_cross_entropies_on_any_leading_axes(
    leading: tuple, sizes: tuple, seed: int, dtype: str, magnitude: float, weights: str
) -> None:
    rng = np.random.default_rng(seed)
    hidden = magnitude * rng.standard_normal((*leading, sizes[1]))
    hidden, kernel = rounded(dtype, hidden, magnitude * rng.standard_normal(sizes))
    labels = rng.integers(0, sizes[0], leading)
    weight = {
        "none": lambda: None,
        "some": lambda: rng.integers(0, 3, leading).astype("float64"),
        "last axis": lambda: rng.random(leading[-1:]),
        "zero": lambda: np.zeros(leading),
    }[weights]()
    full = None if weight is None else np.broadcast_to(weight, leading).astype("float64")
    expected, _ = oracles.linear_cross_entropy(hidden, kernel, labels, full)
    arrays = [x.astype(dtype) for x in (hidden, kernel)]
    loss = helpers.jitted(ops.linear_cross_entropy)(*arrays, labels, weight)
    bound = bound_of(dtype, hidden @ kernel.T)
    assert_close([loss], [np.asarray(expected)], bound)
    each = [
        oracles.linear_cross_entropy(row, kernel, label)[0]
        for row, label in zip(hidden.reshape(-1, 1, sizes[1]), labels.reshape(-1, 1), strict=True)
    ]
    losses = helpers.jitted(ops.token_cross_entropy)(*arrays, labels)
    assert_close([losses], [np.reshape(each, leading)], bound)
