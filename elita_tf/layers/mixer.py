"""The base class of all sequence layers with a state."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from elita_tf.layers.arguments import input_width, require_known
from elita_tf.layers.segments import (
    SEGMENT_ID,
    follow_segments,
    mask_of,
    positions_of,
    require_state,
)
from elita_tf.ops.arguments import (
    require_counts,
    require_segment_ids,
    require_shapes,
    segment_axes,
)

POSITION = "position"


class SequenceMixer(keras.layers.Layer):
    """Base class of layers that mix the positions of a sequence through a state of constant size.

    A mixer computes, position by position,

        state_t, mixed_t = op(terms_t, state_{t-1})          outputs_t = W mixed_t

    where the terms (keys, values, decays and the like) are functions of the inputs. A subclass
    states only what is its own:

        create_weights   its weights
        state_shapes     the leaves of its state
        make_terms       how inputs become the terms of its op
        masked_terms     what the terms are at a masked position
        run_sequence     the op over a sequence
        run_step         the op at one position (optional)
        make_outputs     how the op's results become outputs (default: `self.output_projection`)
        output_kernel    the kernel that writes the outputs (default: that of the projection)

    This class does the rest, in the same way for all mixers: masks, segments, positions, the
    checks of a call, the initial state, `call`, `call_with_state`, and calls of one position, which
    take no loop. The result streams in `Streaming`, and can be saved and exported.

    Args:
        **kwargs: of `keras.layers.Layer`, such as name, dtype, trainable.

    Call arguments:
        inputs: (batch, time, hidden).
        mask: optional boolean (batch, time). A masked position takes no part and advances no
            position; its own output is finite and otherwise unspecified. What the inputs hold
            there has no influence, not even NaN.
        segment_ids: optional integers (batch, time). Where they differ from the real position
            before, a segment begins: it sees nothing earlier, and its positions count from 0.

    Returns:
        (batch, time, hidden).

    Raises:
        ValueError: an unknown argument, or a shape of inputs, mask, segments or state that does
            not fit.

    Example: a moving average with a learned decay for every feature, in terms of a public op.

    >>> import keras
    >>> import numpy as np
    >>> from elita_tf import layers, ops
    >>> class MovingAverage(layers.SequenceMixer):
    ...     masked_terms = {"key": 0.0, "log_decay": 0.0}
    ...
    ...     def create_weights(self, inputs_shape):
    ...         self.gate = self.add_weight((self.hidden_dim, 1), "zeros", autocast=False)
    ...         self.output_projection = keras.layers.Dense(self.hidden_dim)
    ...         self.output_projection.build(inputs_shape)
    ...
    ...     def state_shapes(self):
    ...         return {"average": (self.hidden_dim, 1, 1)}
    ...
    ...     def make_terms(self, inputs, positions, mask):
    ...         value = inputs[..., None]
    ...         log_decay = keras.ops.log_sigmoid(self.gate) + keras.ops.zeros_like(value)
    ...         query, key = keras.ops.ones_like(value), 1.0 - keras.ops.exp(log_decay)
    ...         return {"query": query, "key": key, "value": value, "log_decay": log_decay}
    ...
    ...     def run_sequence(self, terms, state, segment_ids):
    ...         outputs, average = ops.gated_linear_attention(
    ...             **terms, initial_state=state and state["average"], segment_ids=segment_ids
    ...         )
    ...         return outputs[..., 0], {"average": average}
    >>> layer = MovingAverage()
    >>> x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    >>> whole = layer(x)
    >>> first, state = layer.call_with_state(x[:, :3], layer.get_initial_state(2))
    >>> second, state = layer.call_with_state(x[:, 3:], state)
    >>> bool(np.allclose(np.concatenate([first, second], axis=1), whole, atol=1e-6))
    True

    Source: the contract is this package's; docs/extending.md explains it.
    """

    # The value that a term has at masked positions, so that they leave the state as it is.
    masked_terms: dict[str, float] = {}

    # The value that a leaf of the state starts with, where that is not 0.
    initial_values: dict[str, float] = {}

    # Optional method `run_step(terms, state)`: as `run_sequence` with a state, but the terms and
    # the result have no time axis. Without it, one position is a sequence.
    run_step: Callable[..., tuple[Any, dict[str, Any]]] | None = None

    def __init__(self, **kwargs: Any) -> None:
        require_known(self, kwargs)
        super().__init__(**kwargs)
        self.supports_masking = True

    # === What a mixer states ===

    def create_weights(self, inputs_shape: tuple[int | None, ...]) -> None:
        """Make the weights and build the sublayers; `self.hidden_dim` is known here.

        Give sublayers `dtype=self.dtype_policy`, so that mixed precision reaches them, and weights
        of one's own `autocast=False` if they need all digits.
        """
        raise NotImplementedError

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf of the state, without its first axis, the batch.

        Leaves have the dtype `self.state_dtype`. One leaf has a meaning of its own: a mixer with
        `"position": ()` is given the absolute position of every input, and its state counts them.
        """
        raise NotImplementedError

    def make_terms(self, inputs: Any, positions: Any, mask: Any) -> dict[str, Any]:
        """The terms of the op, from the inputs.

        Args:
            inputs: (batch, time, hidden), 0 at masked positions.
            positions: int32 (batch or 1, time), the absolute position of each input in its
                segment; None unless "position" is a leaf of the state.
            mask: boolean (batch, time) or None. Most mixers need it only for `masked_terms`, which
                are put in afterwards.

        Returns:
            A dict of terms (batch, time, ...), or None for a term that the op can do without.
        """
        raise NotImplementedError

    def run_sequence(
        self, terms: dict[str, Any], state: dict[str, Any] | None, segment_ids: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The op over a sequence.

        Args:
            terms: of `make_terms`, with the `masked_terms` put in.
            state: before the first position; None for an empty one, in a call that needs no state
                afterwards.
            segment_ids: int32 (batch, time) or None. Where they differ from the position before,
                a segment begins, from an empty state. The ops of `elita_tf.ops` take them.

        Returns:
            The results (batch, time, ...) for `make_outputs`, and the leaves of the new state; the
            leaf `position` is not among them.
        """
        raise NotImplementedError

    def make_outputs(self, inputs: Any, mixed: Any) -> Any:
        """The outputs (batch, time, hidden), from the inputs and the results of the op."""
        return self.output_projection(mixed)

    @property
    def output_kernel(self) -> keras.Variable:
        """The kernel that makes the outputs. A residual block scales it or sets it to zero."""
        return self.output_projection.kernel

    # === What follows from it ===

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        segment_ids_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        self.hidden_dim = input_width(type(self).__name__, inputs_shape)
        self.create_weights(inputs_shape)

    def call(self, inputs: Any, mask: Any = None, segment_ids: Any = None) -> Any:
        return self._advance(inputs, None, mask, segment_ids)[0]

    def call_with_state(
        self, inputs: Any, state: dict[str, Any], mask: Any = None, segment_ids: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """Continue from `state`: (outputs, new state); what `call` does, in pieces.

        With `segment_ids`, the new state also holds the last one as `segment_id`.
        """
        self._require_built()
        require_state(self, state, set(self.state_shapes()))
        outputs, state = self._advance(inputs, state, mask, segment_ids)
        return outputs, self._cast_state(state)

    def get_initial_state(self, batch_size: int) -> dict[str, Any]:
        """The state before the first position: a flat dict of arrays, the batch first in each."""
        self._require_built()
        require_counts(f"the state of `{self.name}`", batch_size=batch_size)
        return {
            name: ops.full(
                (batch_size, *shape), self.initial_values.get(name, 0), self._leaf_dtype(name)
            )
            for name, shape in self.state_shapes().items()
        }

    @property
    def state_dtype(self) -> str:
        """The dtype of states and sums, float32 also where the layer computes in 16 bits."""
        return "float64" if self.compute_dtype == "float64" else "float32"

    def compute_output_shape(
        self,
        inputs_shape: tuple[int | None, ...],
        segment_ids_shape: tuple[int | None, ...] | None = None,
    ) -> tuple[int | None, ...]:
        return inputs_shape

    def _advance(
        self, inputs: Any, state: dict[str, Any] | None, mask: Any, segment_ids: Any
    ) -> tuple[Any, dict[str, Any]]:
        mask = mask_of(inputs, mask)
        self._require_call(inputs, state, mask, segment_ids)
        segments, state, kept = follow_segments(self, state, mask, segment_ids)
        state = state and self._cast_state(state)
        if mask is not None:
            mask = ops.cast(mask, "bool")
            # A NaN at a masked position would pass through every product with 0, forward and back.
            inputs = ops.where(mask[..., None], inputs, 0.0)
        positions = None
        if POSITION in self.state_shapes():
            offset = state and state[POSITION]
            positions, kept[POSITION] = positions_of(inputs, offset, mask, segments)
        terms = self._with_masked_terms(self.make_terms(inputs, positions, mask), mask)
        if state is not None and inputs.shape[1] == 1 and self.run_step is not None:
            mixed, final = self._one_position(terms, state)
        else:
            mixed, final = self.run_sequence(terms, state, segments)
        return self.make_outputs(inputs, mixed), {**final, **kept}

    def _with_masked_terms(self, terms: dict[str, Any], mask: Any) -> dict[str, Any]:
        if mask is None:
            return terms
        replaced = {}
        for name, value in self.masked_terms.items():
            if terms[name] is not None:
                real = mask[(..., *[None] * (len(terms[name].shape) - 2))]
                replaced[name] = ops.where(real, terms[name], value)
        return {**terms, **replaced}

    def _one_position(
        self, terms: dict[str, Any], state: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """`run_step` on terms (batch, 1, ...): no loop over time, which some exports refuse."""
        terms = {k: x if x is None else ops.squeeze(x, axis=1) for k, x in terms.items()}
        mixed, state = self.run_step(terms, state)
        return ops.expand_dims(mixed, axis=1), state

    def _leaf_dtype(self, name: str) -> str:
        return "int32" if name in (POSITION, SEGMENT_ID) else self.state_dtype

    def _cast_state(self, state: dict[str, Any]) -> dict[str, Any]:
        return {name: ops.cast(leaf, self._leaf_dtype(name)) for name, leaf in state.items()}

    def _require_built(self) -> None:
        if not self.built:
            raise ValueError(
                f"The state of `{self.name}` has sizes that come from its input width, and the "
                "layer is not built. Call it on an input, or call `build(inputs_shape)`, first."
            )

    def _require_call(self, inputs: Any, state: Any, mask: Any, segment_ids: Any) -> None:
        """Raise a ValueError unless what the caller passed fits the layer and one another."""
        tensors = {"inputs": (inputs, f"batch time {self.hidden_dim}")}
        if mask is not None:
            tensors["mask"] = mask, "batch time"
        if state is not None:
            shapes = {**self.state_shapes(), SEGMENT_ID: ()}
            tensors |= {
                f"state {name}": (leaf, " ".join(("batch", *map(str, shapes[name]))))
                for name, leaf in state.items()
            }
        require_shapes(f"`{self.name}`", **tensors, **segment_axes(segment_ids))
        require_segment_ids(f"`{self.name}`", segment_ids)
