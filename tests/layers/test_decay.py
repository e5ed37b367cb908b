"""Half-lives of heads, and the biases at which gates have them."""

import math
from typing import Any

import numpy as np
import pytest

from elita_tf.layers.decay import half_life_bias, require_half_lives, spread_half_lives


@pytest.mark.parametrize(
    ("num_heads", "expected"),
    [
        (1, [64.0]),
        (2, [1.0, 65_536.0]),
        (3, [1.0, 64.0, 65_536.0]),
        (8, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 65_536.0]),
    ],
)
def test_half_lives_are_spread_over_the_heads(num_heads: int, expected: list) -> None:
    half_lives = spread_half_lives((1.0, 64.0), num_heads)
    assert half_lives.dtype == "float64"
    assert half_lives.tolist() == pytest.approx(expected, rel=1e-12)


def test_half_lives_are_geometric_between_any_two() -> None:
    half_lives = spread_half_lives((3, 0.5), 6)
    assert half_lives[0] == pytest.approx(3.0) and half_lives[-2] == pytest.approx(0.5)
    ratios = half_lives[1:-1] / half_lives[:-2]
    assert ratios.tolist() == pytest.approx([ratios[0]] * 4)


@pytest.mark.parametrize("normalizer", [1.0, 16.0, 0.25])
def test_the_bias_is_the_inverse_of_softplus(normalizer: float) -> None:
    half_lives = np.array([1e-3, 0.1, 1.0, 7.0, 64.0, 1000.0, 65_536.0])
    bias = half_life_bias(half_lives, normalizer)
    assert np.isfinite(bias).all()
    # Softplus without overflow, and without loss where it is small.
    softplus = np.maximum(bias, 0.0) + np.log1p(np.exp(-np.abs(bias)))
    expected = math.log(2.0) / half_lives * normalizer
    assert softplus.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_the_bias_is_zero_where_the_half_life_is_the_normalizer() -> None:
    assert half_life_bias(np.array([16.0]), 16.0)[0] == pytest.approx(0.0, abs=1e-12)
    assert half_life_bias(np.array([1.0]))[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("half_lives", [(1.0, 64.0), [1, 64], (64.0, 1.0), (2.0, 2.0)])
def test_two_numbers_above_0_are_half_lives(half_lives: Any) -> None:
    require_half_lives("Layer", half_lives)


@pytest.mark.parametrize("bad", [True, math.nan, math.inf, -math.inf, 0, 0.0, -1.0, "2", None])
@pytest.mark.parametrize("place", [0, 1])
def test_a_half_life_that_is_no_number_above_0_is_named(bad: Any, place: int) -> None:
    half_lives = [3.0, 3.0]
    half_lives[place] = bad
    with pytest.raises(ValueError) as error:
        require_half_lives("Layer", tuple(half_lives))
    for part in ("`half_lives` of Layer", "two numbers of positions above 0", repr(bad)):
        assert part in str(error.value)


@pytest.mark.parametrize("bad", [3.0, True, (), (1.0,), (1.0, 2.0, 3.0), "12", {1.0: 2.0}, None])
def test_what_is_no_pair_is_named(bad: Any) -> None:
    with pytest.raises(ValueError) as error:
        require_half_lives("Layer", bad)
    assert f"received {bad!r}" in str(error.value)
