"""Branches that are computed again for their gradient: the same numbers, whole and in pieces."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.layers import FeedForward2, GatedFeedForward
from elita_tf.models import rematerialization
from elita_tf.models.blocks import run_directly, variables_of, with_weights
from elita_tf.models.rematerialization import rematerialized, run_rematerialized
from tests import helpers
from tests.helpers import BATCH, TIME, randomized
from tests.mixers import MAIN, WIDTH

RNG = np.random.default_rng(0)
X, COTANGENT = RNG.standard_normal((2, BATCH, TIME, WIDTH))
MASK = np.arange(TIME) >= np.array([[3], [0]])
SEGMENT_IDS = np.array([[9] * 7 + [2] * 6, [5] * 5 + [6] * 8], "int32")
MIXER_INPUTS = {
    "plain": {"mask": None, "segment_ids": None},
    "masked": {"mask": MASK, "segment_ids": None},
    "packed": {"mask": MASK, "segment_ids": SEGMENT_IDS},
}
FEED_FORWARDS = {
    "swiglu": lambda **k: GatedFeedForward(17, **k),
    "feed_forward2": lambda **k: FeedForward2(11, 3, **k),
}
CASES = {
    f"{name}, {given}": (make, tensors)
    for name, make in MAIN.items()
    for given, tensors in MIXER_INPUTS.items()
} | {name: (make, {}) for name, make in FEED_FORWARDS.items()}


def branch(make: Any, dtype: str = "float64") -> list[keras.layers.Layer]:
    """A norm and a layer, as in a block."""
    layers = [keras.layers.LayerNormalization(dtype=dtype), make(dtype=dtype)]
    for layer in layers:
        layer.build(X.shape)
    return [randomized(layer, scale=0.3) for layer in layers]


def gradients(
    layers: Sequence[keras.layers.Layer], tensors: dict[str, Any], again: bool
) -> helpers.Vjp:
    """Outputs at real positions, and the gradients of the inputs and of all weights."""

    def run(x: Any, *weights: Any) -> Any:
        if again:
            return rematerialized(layers, weights, x, tensors)
        return with_weights(layers, weights, lambda: run_directly(layers, x, **tensors))

    real = 1.0 if tensors.get("mask") is None else MASK[..., None]
    weights = [helpers.leaves(variable)[0] for variable in variables_of(layers)]
    outputs, found = helpers.vjp(run, [X, *weights], [COTANGENT * real])
    return helpers.Vjp([outputs[0] * real], found)


@pytest.mark.parametrize("piece_tokens", [10**6, 10, 25], ids=["whole", "three pieces", "two"])
@pytest.mark.parametrize(("make", "tensors"), CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_are_the_same(
    make: Any, tensors: dict[str, Any], piece_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rematerialization, "_PIECE_TOKENS", piece_tokens)
    layers = branch(make)
    received, expected = (gradients(layers, tensors, again) for again in (True, False))
    helpers.assert_close(received.outputs, expected.outputs, helpers.LAYER_BOUND)
    helpers.assert_jointly_close(received.gradients, expected.gradients, helpers.LAYER_BOUND)


@helpers.tensorflow_only
@pytest.mark.parametrize("make", [MAIN["gla"], FEED_FORWARDS["swiglu"]], ids=["gla", "swiglu"])
def test_what_is_inside_exists_for_one_piece_at_a_time(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, shape = branch(make, "float32"), (1, 640, WIDTH)

    def largest(piece_tokens: int) -> int:
        monkeypatch.setattr(rematerialization, "_PIECE_TOKENS", piece_tokens)
        return helpers.traced_cost(
            lambda x: run_rematerialized(layers, x), [shape], [shape]
        ).largest

    assert largest(32) == np.prod(shape) < largest(640)


def test_an_assignment_would_be_lost() -> None:
    class Counting(keras.layers.Layer):
        def build(self, inputs_shape: Any) -> None:
            self.calls = self.add_weight((), "zeros", trainable=False, name="calls")

        def call(self, x: Any) -> Any:
            self.calls.assign(self.calls + 1.0)
            return x

    layer = Counting(dtype="float64")
    layer.build(X.shape)
    with pytest.raises(ValueError, match="calls"):
        run_rematerialized([layer], keras.ops.convert_to_tensor(X))
