"""A block of the decoder: two residual lines, and the ways of running what stands beside them.

A runner is a function `run(layers, x, **tensors)`. It gives what `run_directly` gives, which sends
`x` through the layers, one after the other. It receives the layers themselves, so it knows all the
weights that it computes with.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

Runner = Callable[..., Any]


def run_directly(layers: Sequence[keras.layers.Layer], x: Any, **tensors: Any) -> Any:
    """`x` through the layers, one after the other; the last one also gets the keyword tensors."""
    *before, last = layers
    for layer in before:
        x = layer(x)
    return last(x, **tensors)


def variables_of(layers: Sequence[keras.layers.Layer]) -> list[keras.Variable]:
    """All variables of all layers."""
    return [variable for layer in layers for variable in layer.variables]


def with_weights(
    layers: Sequence[keras.layers.Layer], weights: Sequence[Any], run: Callable[[], Any]
) -> Any:
    """`run()`, in which the variables of the layers have other values.

    A gradient of these values is one of function arguments, which every kind of gradient passes on.

    Raises:
        ValueError: a layer assigns to one of its variables. The assignment would be lost.
    """
    variables = variables_of(layers)
    # A gradient of a frozen weight would be computed.
    values = [
        weight if variable.trainable else ops.stop_gradient(weight)
        for variable, weight in zip(variables, weights, strict=True)
    ]
    with keras.StatelessScope(list(zip(variables, values, strict=True))) as scope:
        given = [scope.get_current_value(variable) for variable in variables]
        outputs = run()
        for variable, value in zip(variables, given, strict=True):
            if scope.get_current_value(variable) is not value:
                raise ValueError(
                    f"A layer assigns to its variable {variable.path!r} when it is called. That "
                    "would be lost where branches of blocks are programs of their own or are "
                    "computed again. Pass rematerialize=False, and jit_compile=True or False."
                )
    return outputs


class ResidualBranch(NamedTuple):
    """A residual line: x + dropout(layer(norm(x))).

    A runner has the norm and the layer. It does not have the dropout, as a branch that is
    computed again for the backward pass would draw another mask.
    """

    norm: keras.layers.Layer
    layer: keras.layers.Layer
    dropout: keras.layers.Dropout

    def __call__(
        self, x: Any, run: Runner = run_directly, training: bool | None = None, **tensors: Any
    ) -> Any:
        return x + self.dropout(run([self.norm, self.layer], x, **tensors), training=training)

    def call_with_state(
        self, x: Any, state: dict[str, Any], training: bool | None = None, **tensors: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The same for a layer that goes on from a state: the sum, and the new state."""
        outputs, state = self.layer.call_with_state(self.norm(x), state, **tensors)
        return x + self.dropout(outputs, training=training), state


class Block(NamedTuple):
    """x = x + mixer(norm(x));  x = x + feed_forward(norm(x)).

    The keyword tensors are the mixer's: `mask` and `segment_ids`, or None for either.
    """

    mixer: ResidualBranch
    feed_forward: ResidualBranch

    def __call__(
        self, x: Any, run: Runner = run_directly, training: bool | None = None, **tensors: Any
    ) -> Any:
        x = self.mixer(x, run, training, **tensors)
        return self.feed_forward(x, run, training)

    def call_with_state(
        self, x: Any, state: dict[str, Any], training: bool | None = None, **tensors: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The same from the mixer's state on: the outputs, and the new state."""
        x, state = self.mixer.call_with_state(x, state, training, **tensors)
        return self.feed_forward(x, training=training), state


def draws_random_numbers(block: Block) -> bool:
    """Whether the mixer or the feed-forward has random numbers of its own, as for dropout.

    They would be lost, or others for the gradient, wherever a branch is not run directly.
    """
    layers = (block.mixer.layer, block.feed_forward.layer)
    names = [variable.name for layer in layers for variable in layer.variables]
    return "seed_generator_state" in names


def require_no_remat_scope(owner: str) -> None:
    """Raises ValueError within `keras.RematScope` on TensorFlow, where it fails in `fit`."""
    # Layers remember the scope that they are made in; Keras has no other way to ask.
    mode = getattr(keras.layers.Identity(name="probe"), "_remat_mode", None)
    if mode is not None and keras.backend.backend() == "tensorflow":
        raise ValueError(
            f"{owner} does not train within keras.RematScope on TensorFlow, as Keras passes "
            "keywords that TensorFlow's custom gradients refuse. Leave the scope, and pass "
            "rematerialize=True to ElitaCausalLM."
        )
