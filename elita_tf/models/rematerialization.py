"""Branches that are computed again for their gradient, long sequences piece by piece.

Only the inputs of a branch are kept. What is inside it exists for one piece at a time: a mixer goes
on from piece to piece by its state, and a feed-forward works on every position alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from elita_tf.layers.segments import SEGMENT_ID
from elita_tf.models.blocks import run_directly, variables_of, with_weights
from elita_tf.ops.chunking import merge_axis, split_axis
from elita_tf.ops.slicing import accumulate_slices

# Tokens in a piece at the most: so many that the loop over the pieces costs nothing.
_PIECE_TOKENS = 16_384


def run_rematerialized(layers: Sequence[keras.layers.Layer], x: Any, **tensors: Any) -> Any:
    """A runner (see `elita_tf.models.blocks`) that keeps only `x` for the backward pass."""
    weights = [ops.convert_to_tensor(variable) for variable in variables_of(layers)]
    return rematerialized(layers, weights, x, tensors)


def rematerialized(
    layers: Sequence[keras.layers.Layer], weights: list[Any], x: Any, tensors: dict[str, Any]
) -> Any:
    """`run_rematerialized` with these values of the layers' variables."""
    batch_size, time = x.shape[:2]
    num_pieces = 1 if time is None else -(-(batch_size or 1) * time // _PIECE_TOKENS)
    # A weight of integers, of a quantized layer, has no gradient to be added up.
    if num_pieces == 1 or not all(map(_is_float, weights)):

        def inside(x: Any, *weights: Any) -> Any:
            return with_weights(layers, weights, lambda: run_directly(layers, x, **tensors))

        return keras.remat(inside)(x, *weights)
    size = -(-time // num_pieces)
    state = _initial_state(layers[-1], x, tensors.get("segment_ids"))
    pieces = {name: _split(tensor, size) for name, tensor in tensors.items() if tensor is not None}

    def branch(index: Any, x: Any, state: dict[str, Any], weights: Sequence[Any]) -> Any:
        given = {name: ops.take(tensor, index, axis=0) for name, tensor in pieces.items()}
        return with_weights(layers, weights, lambda: _piece(layers, x, state, given))

    outputs = _chained(branch, state, _split(x, size), weights)
    return merge_axis(ops.moveaxis(outputs, 0, 1), time, axis=1)


def _piece(
    layers: Sequence[keras.layers.Layer], x: Any, state: dict[str, Any], tensors: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The outputs of a piece, and the state after it."""
    *before, last = layers
    for layer in before:
        x = layer(x)
    return last.call_with_state(x, state, **tensors) if state else (last(x, **tensors), {})


def _chained(
    branch: Callable[..., tuple[Any, dict[str, Any]]],
    initial: dict[str, Any],
    pieces: Any,
    weights: Sequence[Any],
) -> Any:
    """The outputs (pieces, ...) of a branch that takes a state from piece to piece.

    Forwards, the state before every piece is kept. Backwards, a piece is computed again, the
    gradient of the state goes on to the piece before, and those of the weights are added up.
    """
    num_pieces = pieces.shape[0]
    # Positions and segments have no gradient.
    sums = [name for name, leaf in initial.items() if _is_float(leaf)]

    @ops.custom_gradient
    def run(pieces: Any, *weights: Any) -> Any:
        def forward(index: Any, state: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
            outputs, later = branch(index, ops.take(pieces, index, axis=0), state, weights)
            # By name, as JAX sorts a dict.
            return [outputs, *(state[name] for name in initial)], {x: later[x] for x in initial}

        stacks = [pieces, *(ops.stack([leaf] * num_pieces) for leaf in initial.values())]
        (outputs, *earlier), _ = accumulate_slices(forward, num_pieces, stacks, initial)

        def grad(upstream: Any) -> tuple[Any, ...]:
            def backward(index: Any, totals: list[Any]) -> tuple[list[Any], list[Any]]:
                x, d_outputs, *leaves = (
                    ops.take(x, index, 0) for x in (pieces, upstream, *earlier)
                )
                state = dict(zip(initial, leaves, strict=True))
                d_sums, d_weights = totals[: len(sums)], totals[len(sums) :]

                def again(x: Any, *arguments: Any) -> list[Any]:
                    own = dict(zip(sums, arguments[: len(sums)], strict=True))
                    outputs, later = branch(index, x, {**state, **own}, arguments[len(sums) :])
                    return [outputs, *(later[name] for name in sums)]

                arguments = [x, *(state[name] for name in sums), *weights]
                d_x, *gradients = _pull_back(again, arguments, [d_outputs, *d_sums])
                added = zip(d_weights, gradients[len(sums) :], strict=True)
                return [d_x], gradients[: len(sums)] + [x + y for x, y in added]

            zeros = [ops.zeros_like(x) for x in (*(initial[name] for name in sums), *weights)]
            (d_pieces,), totals = accumulate_slices(
                backward, num_pieces, [upstream], zeros, reverse=True
            )
            return d_pieces, *totals[len(sums) :]

        return outputs, grad

    return run(pieces, *weights)


def _pull_back(
    function: Callable[..., Sequence[Any]], arguments: Sequence[Any], upstream: Sequence[Any]
) -> list[Any]:
    """The gradients of <upstream, function(*arguments)>: one for each floating-point argument.

    Args:
        function: of floating-point arguments, with floating-point results.
        arguments: tensors.
        upstream: a tensor for each result.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(arguments)
            results = function(*arguments)
        zero = tf.UnconnectedGradients.ZERO
        return tape.gradient(results, arguments, upstream, unconnected_gradients=zero)
    import jax

    results, backward = jax.vjp(function, *arguments)
    return list(backward(type(results)(upstream)))


def _initial_state(layer: keras.layers.Layer, x: Any, segment_ids: Any) -> dict[str, Any]:
    """Of a mixer; a feed-forward has none."""
    if not hasattr(layer, "call_with_state"):
        return {}
    state = layer.get_initial_state(ops.shape(x)[0])
    if segment_ids is not None:
        # Every piece is to have it. A segment that begins with an empty state changes nothing.
        state[SEGMENT_ID] = ops.cast(segment_ids[:, 0], "int32")
    return state


def _is_float(x: Any) -> bool:
    return keras.backend.is_float_dtype(x.dtype)


def _split(x: Any, size: int) -> Any:
    """(batch, time, ...) to (pieces, batch, size, ...).

    The last piece is filled up with zeros, which nothing before them sees.
    """
    return ops.moveaxis(split_axis(x, size, axis=1), 1, 0)
