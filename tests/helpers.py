"""Gradients, error norms and compilation, written once for the TensorFlow and JAX backends.

Sizes of the tests are all distinct, so that a swapped axis cannot go unnoticed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis
import keras
import numpy as np
import pytest

BATCH, TIME, HEADS, HIDDEN, KEY_DIM, VALUE_DIM, CHUNK = 2, 13, 3, 10, 5, 7, 4

BACKEND = keras.backend.backend()
# A float64 layer. On JAX, Keras computes sin, tanh and means of float64 tensors in float32.
LAYER_BOUND = 1e-10 if BACKEND == "tensorflow" else 1e-6
# `jit_compile` of few steps: outside XLA, JAX would run operation by operation.
QUICKEST = BACKEND == "jax"
tensorflow_only = pytest.mark.skipif(BACKEND != "tensorflow", reason="needs TensorFlow's graphs")


def budget(short: int, long: int) -> hypothesis.settings:
    """Inputs that a property test tries: `short` in every run, `long` with `pytest --soak`."""
    if hypothesis.settings.get_current_profile_name() == "soak":
        return hypothesis.settings(max_examples=long)
    # JAX compiles anew for every shape.
    return hypothesis.settings(max_examples=max(2, short // 3) if BACKEND == "jax" else short)


class Vjp(NamedTuple):
    """All output leaves of a function, and the gradient of every argument leaf."""

    outputs: list[np.ndarray]
    gradients: list[np.ndarray]


def leaves(structure: Any) -> list[np.ndarray]:
    """The leaves of a structure as NumPy arrays, bfloat16 widened to float32."""
    tensors = [keras.ops.convert_to_tensor(leaf) for leaf in keras.tree.flatten(structure)]
    arrays = [np.asarray(tensor) for tensor in tensors]
    return [a.astype("float32") if a.dtype.name == "bfloat16" else a for a in arrays]


def cast(structure: Any, dtype: str) -> Any:
    """The floating leaves of a structure as tensors of `dtype`; integer leaves keep theirs."""

    def convert(leaf: Any) -> Any:
        tensor = keras.ops.convert_to_tensor(leaf)
        return keras.ops.cast(tensor, dtype) if np.asarray(leaf).dtype.kind == "f" else tensor

    return keras.tree.map_structure(convert, structure)


def random_like(structure: Any, seed: int = 7) -> list[np.ndarray]:
    """One standard normal float64 array for every leaf of a structure."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(np.shape(leaf)) for leaf in keras.tree.flatten(structure)]


def randomized(layer: keras.layers.Layer, scale: float = 0.5, seed: int = 11) -> Any:
    """The built layer with every weight drawn anew, so that none is at a telling 0 or 1."""
    weights = random_like(layer.get_weights(), seed)
    layer.set_weights([scale * weight for weight in weights])
    return layer


def differentiated(function: Callable, structure: Sequence) -> Callable:
    """The flat function (argument leaves, cotangents) -> (output leaves, argument gradients)."""

    def forward(*flat: Any) -> list:
        return keras.tree.flatten(function(*keras.tree.pack_sequence_as(structure, flat)))

    def like(cotangents: Sequence, outputs: Sequence) -> list:
        return [keras.ops.cast(c, o.dtype) for c, o in zip(cotangents, outputs, strict=True)]

    def tensorflow_vjp(flat: Sequence, cotangents: Sequence) -> tuple[list, list]:
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(flat)
            outputs = forward(*flat)
        gradients = tape.gradient(
            outputs,
            flat,
            output_gradients=like(cotangents, outputs),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return outputs, [tf.convert_to_tensor(gradient) for gradient in gradients]

    def jax_vjp(flat: Sequence, cotangents: Sequence) -> tuple[list, list]:
        import jax

        outputs, pullback = jax.vjp(forward, *flat)
        return outputs, list(pullback(like(cotangents, outputs)))

    return jax_vjp if BACKEND == "jax" else tensorflow_vjp


def vjp(
    function: Callable,
    arguments: Sequence,
    cotangents: Sequence[np.ndarray],
    transform: Callable[[Callable], Callable] | None = None,
) -> Vjp:
    """Outputs and gradients of `function(*arguments)`; `transform` may compile the pair.

    By default TensorFlow runs it eagerly, and JAX, which would compile every operation of its own,
    compiles it once.
    """
    transform = transform or jitted
    flat = [keras.ops.convert_to_tensor(leaf) for leaf in keras.tree.flatten(arguments)]
    cotangents = [keras.ops.convert_to_tensor(cotangent) for cotangent in cotangents]
    outputs, gradients = transform(differentiated(function, arguments))(flat, cotangents)
    return Vjp(leaves(outputs), leaves(gradients))


def eager(function: Callable) -> Callable:
    """The function as it is."""
    return function


def xla(function: Callable) -> Callable:
    """Compile with XLA."""
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, jit_compile=True)


def graph(function: Callable) -> Callable:
    """A TensorFlow graph, one for many shapes if need be; on JAX, a compiled program."""
    if BACKEND == "jax":
        return xla(function)
    import tensorflow as tf

    return tf.function(function, reduce_retracing=True)


def jitted(function: Callable) -> Callable:
    """On JAX, which would compile every operation of its own, the function compiled once.

    Weights are constants of it: make another after they change, and give it no dropout.
    """
    # Of equal functions, as a model is to itself, JAX would compile the first only.
    return xla(lambda *args, **kwargs: function(*args, **kwargs)) if BACKEND == "jax" else function


_GRAPHS: dict[tuple, Callable] = {}


def graph_of(function: Callable, arguments: Sequence) -> Callable[[Callable], Callable]:
    """A transform for `vjp` that makes one graph of the function, which all calls share.

    Many cases of one function are far quicker so than operation by operation. The function must
    have no weights, and must be the same object in every call.
    """
    key = function, repr(keras.tree.map_structure(lambda _: None, arguments))

    def transform(flat_function: Callable) -> Callable:
        if key not in _GRAPHS:
            _GRAPHS[key] = graph(flat_function)
        return _GRAPHS[key]

    return transform


@functools.cache
def outputs_of(form: Callable) -> Callable[..., np.ndarray]:
    """The outputs of a sequence op, without its state, by one compiled program a shape."""
    function = graph(form)
    return lambda *inputs: leaves(function(*map(keras.ops.convert_to_tensor, inputs))[0])[0]


def dynamic_vjp(function: Callable, arguments: Sequence, outputs: Any, sizes: set[int]) -> Callable:
    """`vjp` of one TensorFlow graph in which every axis of a size in `sizes` is unknown."""
    import tensorflow as tf

    def spec(leaf: Any, dtype: str | None = None) -> Any:
        shape = [None if size in sizes else size for size in np.shape(leaf)]
        return tf.TensorSpec(shape, dtype or np.asarray(leaf).dtype)

    signature = [
        [spec(leaf) for leaf in keras.tree.flatten(arguments)],
        [spec(leaf, "float64") for leaf in keras.tree.flatten(outputs)],
    ]
    traced = tf.function(differentiated(function, arguments), input_signature=signature)
    return lambda values, cotangents: vjp(function, values, cotangents, lambda _: traced)


class TracedCost(NamedTuple):
    """Number of operations of a graph and elements of its largest tensor."""

    operations: int
    largest: int


def traced_cost(
    function: Callable, argument_shapes: Sequence[tuple], output_shapes: Sequence[tuple]
) -> TracedCost:
    """Cost of the traced forward and backward, loop bodies included (TensorFlow).

    A dimension unknown in a loop body counts as nothing, so at least one length must be static.
    """
    import tensorflow as tf

    specs = [
        [tf.TensorSpec(shape, "float32") for shape in shapes]
        for shapes in (argument_shapes, output_shapes)
    ]
    traced = tf.function(differentiated(function, specs[0]))
    graph = traced.get_concrete_function(*specs).graph
    definition = graph.as_graph_def(add_shapes=True)
    nodes = list(definition.node)
    for library_function in definition.library.function:
        nodes.extend(library_function.node_def)
    shapes = [shape for node in nodes for shape in node.attr["_output_shapes"].list.shape]
    sizes = [
        int(np.prod([dim.size for dim in shape.dim])) for shape in shapes if not shape.unknown_rank
    ]
    return TracedCost(len(nodes), max(sizes))


def relative_error(actual: Any, expected: Any) -> float:
    """Norm of the difference over the norm of the expectation; equal infinities do not differ."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    with np.errstate(invalid="ignore"):
        difference = np.where(actual == expected, 0.0, actual - expected)
    scale = np.linalg.norm(expected[np.isfinite(expected)])
    return float(np.linalg.norm(difference) / scale) if scale else float(np.linalg.norm(difference))


def assert_close(actual: Any, expected: Any, bound: float) -> None:
    """Every leaf of `actual` is within a relative norm of `bound` of its expectation."""
    pairs = zip(keras.tree.flatten(actual), keras.tree.flatten(expected), strict=True)
    errors = [relative_error(leaf, target) for leaf, target in pairs]
    assert all(error <= bound for error in errors), f"relative errors {errors}, bound {bound}"


def assert_jointly_close(actual: Sequence, expected: Sequence, bound: float) -> None:
    """Every leaf differs by at most `bound` times the norm of all expectations together.

    For extremes, where a whole gradient may be as small as 1e-300 beside the others.
    """
    scale = np.linalg.norm([np.linalg.norm(leaf) for leaf in expected])
    errors = [np.linalg.norm(a - e) / scale for a, e in zip(actual, expected, strict=True)]
    assert all(error <= bound for error in errors), f"errors {errors}, bound {bound}"


def assert_finite(arrays: Sequence[np.ndarray]) -> None:
    """Every array is finite everywhere."""
    flags = [bool(np.isfinite(array).all()) for array in arrays]
    assert all(flags), f"finite by leaf: {flags}"
