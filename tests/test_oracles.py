"""The closed-form gradients of the oracles against central differences of their values."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import pytest

from tests import oracles
from tests.helpers import assert_close, random_like

STEP = 1e-6


def central_differences(function: Callable, arguments: Sequence, cotangents: Sequence) -> list:
    """Gradient of the cotangents' product with the outputs, one entry at a time."""

    def objective(flat: Sequence[np.ndarray]) -> float:
        outputs = function(*keras.tree.pack_sequence_as(arguments, flat))
        pairs = zip(keras.tree.flatten(outputs), cotangents, strict=True)
        return float(sum((output * cotangent).sum() for output, cotangent in pairs))

    flat = [leaf.copy() for leaf in keras.tree.flatten(arguments)]
    gradients = [np.zeros_like(leaf) for leaf in flat]
    for leaf, gradient in zip(flat, gradients, strict=True):
        for index in np.ndindex(leaf.shape):
            original = leaf[index]
            leaf[index] = original + STEP
            above = objective(flat)
            leaf[index] = original - STEP
            gradient[index] = (above - objective(flat)) / (2 * STEP)
            leaf[index] = original
    return gradients


def attention2_case() -> tuple:
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal((2, 4, 3)) for _ in range(3)]
    state = (rng.standard_normal((2, 3)), rng.standard_normal((2, 3, 5)), rng.random((2, 3)) + 0.5)
    arguments = (*logits, rng.standard_normal((2, 4, 3, 5)), state)
    return oracles.attention2, oracles.attention2_gradients, arguments


def decayed_attention2_case() -> tuple:
    _, _, arguments = attention2_case()
    decay = -np.random.default_rng(1).random((2, 4, 3))

    def function(*arguments: Any) -> tuple:
        return oracles.attention2(*arguments[:-1], log_decay=arguments[-1])

    def gradients(arguments: Sequence, cotangents: Sequence) -> list:
        return oracles.attention2_gradients(arguments[:-1], cotangents, arguments[-1])

    return function, gradients, (*arguments, decay)


def gated_linear_attention_case() -> tuple:
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 2, 4, 3, 5))
    value, state = rng.standard_normal((2, 4, 3, 7)), rng.standard_normal((2, 3, 5, 7))
    arguments = (query, key, value, -rng.random((2, 4, 3, 5)), state)
    return oracles.gated_linear_attention, oracles.gated_linear_attention_gradients, arguments


@pytest.mark.parametrize(
    "case", [attention2_case, decayed_attention2_case, gated_linear_attention_case]
)
def test_gradients_are_the_slopes_of_the_values(case: Callable) -> None:
    function, gradients, arguments = case()
    cotangents = random_like(function(*arguments))
    expected = central_differences(function, arguments, cotangents)
    assert_close(gradients(arguments, cotangents), expected, 1e-8)


def test_linear_cross_entropy_gradients_are_the_slopes_of_the_values() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([[0, 4, 2], [1, 1, 3]])
    arguments = (rng.standard_normal((2, 3, 4)), rng.standard_normal((5, 4)), rng.random((2, 3)))

    def loss(hidden: np.ndarray, kernel: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.asarray(oracles.linear_cross_entropy(hidden, kernel, labels, weights)[0])

    expected = central_differences(loss, arguments, [np.ones(())])
    gradients = oracles.linear_cross_entropy(arguments[0], arguments[1], labels, arguments[2])[1]
    assert_close(gradients, expected, 1e-8)


def test_feed_forward2_gradients_are_the_slopes_of_the_values() -> None:
    rng = np.random.default_rng(0)
    shapes = (2, 3, 5), (2, 3, 4), (5, 4, 6)
    arguments = tuple(rng.standard_normal(shape) for shape in shapes)
    cotangent = random_like(oracles.feed_forward2(*arguments))[0]
    expected = central_differences(oracles.feed_forward2, arguments, [cotangent])
    assert_close(oracles.feed_forward2_gradients(*arguments, cotangent), expected, 1e-8)
