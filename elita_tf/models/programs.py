"""One XLA program for all layers of a kind (TensorFlow only).

A training step that is one program has every block compiled apart, alike as they are, and XLA takes
seconds for each. Here the weights of a block are arguments of its program, so that all blocks share
it: deep models start as fast as shallow ones.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops


class Programs:
    """Compiled functions of layers, each shared by all layers of one type and configuration.

    Args:
        rematerialize: keep only the inputs of a program that has layers for its gradient, which
            computes the inside again.
    """

    def __init__(self, rematerialize: bool = False) -> None:
        self._rematerialize = rematerialize
        self._programs: dict[Any, Callable] = {}

    @property
    def in_a_step(self) -> bool:
        """Whether the calls of now are traced, as those of a training step are."""
        return tf.inside_function()

    def compiled(
        self, function: Callable[..., Any], layers: Sequence[keras.layers.Layer] = ()
    ) -> Callable[..., Any]:
        """`function` as a program that calls `layers`, or others that are like them.

        Its positional arguments are tensors, or None, or dicts of these. What else it needs it has
        to have of the layers: what it closes over may be that of an earlier function. Layers can't
        assign to their variables.
        """
        variables = [variable for layer in layers for variable in layer.variables]
        kind = tuple(_kind(layer) for layer in layers) or function
        if kind not in self._programs:
            run = self._with_weights(function, variables) if layers else function
            self._programs[kind] = tf.function(run, autograph=False, jit_compile=True)
        program, weights = self._programs[kind], [variables] if layers else []
        return lambda *args: program(*tf.nest.map_structure(_read, [*weights, *args]))

    def _with_weights(self, function: Callable[..., Any], variables: list[Any]) -> Callable:
        def run(weights: list[Any], *args: Any) -> Any:
            def inside(first: Any, *weights: Any) -> Any:
                # Without it, gradients of frozen weights would be computed, as outputs of programs.
                values = [
                    weight if variable.trainable else ops.stop_gradient(weight)
                    for variable, weight in zip(variables, weights, strict=True)
                ]
                with keras.StatelessScope(list(zip(variables, values, strict=True))):
                    return function(first, *args[1:])

            return (keras.remat(inside) if self._rematerialize else inside)(args[0], *weights)

        return run


def _kind(layer: keras.layers.Layer) -> tuple[Any, ...]:
    """What layers have in common that compute the same function of inputs and weights."""
    config = {key: value for key, value in layer.get_config().items() if key != "name"}
    weights = ((tuple(v.shape), str(v.dtype), v.trainable) for v in layer.variables)
    return type(layer), json.dumps(config, sort_keys=True, default=str), *weights


def _read(x: Any) -> Any:
    """Of a variable, its value: programs are for every variable of a shape."""
    return tf.convert_to_tensor(x) if isinstance(x, keras.Variable) else x
