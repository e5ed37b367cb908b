"""One XLA program for all blocks of a kind (TensorFlow only).

In a training step that is one XLA program, every block is compiled by itself, although the blocks
are alike, and each takes XLA seconds. Here a block's weights are arguments of its program, so that
all blocks of a kind share the program: deep models start as fast as shallow ones.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from elita_tf.models.blocks import run_directly, variables_of, with_weights
from elita_tf.models.rematerialization import rematerialized
from elita_tf.ops import linear_cross_entropy


class SharedCompilation:
    """A runner (see `elita_tf.models.blocks`) that compiles once for all layers of a kind.

    Layers are of a kind if their classes, their configurations but for the name, and the shapes,
    dtypes and trainability of their variables are the same.

    Args:
        rematerialize: keep only the inputs of a program for its gradient, which computes the
            inside again.
    """

    def __init__(self, rematerialize: bool = False) -> None:
        self._rematerialize = rematerialize
        self._programs: dict[tuple, Callable] = {}
        self._cross_entropy = tf.function(linear_cross_entropy, autograph=False, jit_compile=True)

    def run(self, layers: Sequence[keras.layers.Layer], x: Any, **tensors: Any) -> Any:
        """`x` through the layers, in the program of their kind.

        Raises:
            ValueError: a layer assigns to one of its variables when it is called. The assignment
                would be lost.
        """
        kind = tuple(_kind(layer) for layer in layers)
        if kind not in self._programs:
            self._programs[kind] = self._program(layers)
        weights = [tf.convert_to_tensor(variable) for variable in variables_of(layers)]
        return self._programs[kind](weights, x, tensors)

    def linear_cross_entropy(self, hidden: Any, kernel: Any, labels: Any, weights: Any) -> Any:
        """The loss as a program of its own; `weights` are those of the labels, or None."""
        tensors = (hidden, kernel, labels, weights)
        return self._cross_entropy(
            *(tf.convert_to_tensor(x) if isinstance(x, keras.Variable) else x for x in tensors)
        )

    def _program(self, layers: Sequence[keras.layers.Layer]) -> Callable:
        """A function of weights and tensors: what layers of this kind compute with such weights."""

        def run(weights: list[Any], x: Any, tensors: dict[str, Any]) -> Any:
            if self._rematerialize:
                return rematerialized(layers, weights, x, tensors)
            return with_weights(layers, weights, lambda: run_directly(layers, x, **tensors))

        return tf.function(run, autograph=False, jit_compile=True)


def _kind(layer: keras.layers.Layer) -> tuple[Any, ...]:
    """What layers have in common that compute the same function of inputs and weights."""
    config = {key: value for key, value in layer.get_config().items() if key != "name"}
    weights = ((tuple(v.shape), str(v.dtype), v.trainable) for v in layer.variables)
    return type(layer), json.dumps(config, sort_keys=True, default=str), *weights
