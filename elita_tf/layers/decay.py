"""Forget gates that start at given half-lives."""

import math
from typing import Any

import numpy as np

# The half-life of the last head, which at first forgets almost nothing.
_LONGEST_HALF_LIFE = 65_536.0


def require_half_lives(layer: str, half_lives: Any) -> None:
    """Raise a ValueError unless `half_lives` are two finite numbers of positions above 0."""
    fits = isinstance(half_lives, (tuple, list)) and len(half_lives) == 2
    if not fits or not all(_is_positive(each) for each in half_lives):
        raise ValueError(
            f"`half_lives` of {layer}: expected the shortest and the longest half-life of its "
            f"heads, two numbers of positions above 0, received {half_lives!r}."
        )


def spread_half_lives(half_lives: tuple[float, float], num_heads: int) -> np.ndarray:
    """The half-life of every head.

    They are geometric from the first to the second, and the last head's is 65,536; one head alone
    has the second, of two heads the first has the first.

    Example:

    >>> spread_half_lives((1.0, 64.0), 5).tolist()
    [1.0, 4.0, 16.0, 64.0, 65536.0]
    """
    shortest, longest = half_lives
    if num_heads == 1:
        return np.array([float(longest)])
    return np.append(np.geomspace(shortest, longest, num_heads - 1), _LONGEST_HALF_LIFE)


def half_life_bias(half_lives: np.ndarray, normalizer: float = 1.0) -> np.ndarray:
    """The bias b at which softplus(b) / normalizer is ln 2 / half-life.

    Example:

    >>> half_life_bias(np.array([0.5, 1.0])).round(4).tolist()
    [1.0986, 0.0]
    """
    rate = normalizer * math.log(2.0) / half_lives
    return rate + np.log(-np.expm1(-rate))


def _is_positive(number: Any) -> bool:
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    return is_number and 0 < number < math.inf
