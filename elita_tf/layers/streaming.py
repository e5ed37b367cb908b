"""A layer that carries its state through inputs and outputs."""

from typing import Any

import keras

from elita_tf.layers.arguments import require_known


@keras.saving.register_keras_serializable(package="elita_tf")
class Streaming(keras.layers.Layer):
    """Run a sequence layer piece by piece: (inputs, state) to (outputs, state).

    Chaining the pieces of a sequence through the state gives what the layer gives on the whole.
    The state is a flat dict of arrays with the batch first, float32 also under mixed precision
    (the keys and values of CausalSelfAttention excepted), so it can be stored and fed back.

    Args:
        layer: a `SequenceMixer`, such as `Attention2`, `GatedLinearAttention` or
            `CausalSelfAttention`, or any layer with `call_with_state` and `get_initial_state`. Its
            weights are shared, not copied.

    Call arguments:
        inputs: (batch, time, hidden); a time of 1 is one step.
        state: dict of arrays, at first `get_initial_state(batch_size)`.
        mask: optional boolean (batch, time).
        segment_ids: optional integers (batch, time). The new state then also holds the last one as
            `segment_id`, and a first position of another segment starts from the empty state.

    Returns:
        The outputs (batch, time, hidden) and the new state.

    Raises:
        ValueError: a layer without a state, or an unknown argument.

    Example:

    >>> import numpy as np
    >>> from elita_tf import layers
    >>> layer = layers.GatedLinearAttention(num_heads=2)
    >>> x = np.random.default_rng(0).normal(size=(1, 5, 8)).astype("float32")
    >>> whole = layer(x)
    >>> streaming = layers.Streaming(layer)
    >>> first, state = streaming(x[:, :3], streaming.get_initial_state(1))
    >>> second, state = streaming(x[:, 3:], state)
    >>> bool(np.allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5))
    True
    """

    def __init__(self, layer: keras.layers.Layer, **kwargs: Any) -> None:
        require_known(self, kwargs)
        # The state keeps its own dtype: Keras would otherwise cast it to the compute dtype.
        super().__init__(
            **{"dtype": getattr(layer, "dtype_policy", None), **kwargs}, autocast=False
        )
        if not hasattr(layer, "call_with_state"):
            raise ValueError(
                "Streaming wraps a layer that has a state (`call_with_state`, "
                f"`get_initial_state`). Received: {layer!r}."
            )
        self.layer = layer
        self.supports_masking = True

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        state_shape: Any = None,
        segment_ids_shape: Any = None,
    ) -> None:
        if not self.layer.built:
            self.layer.build(inputs_shape)

    def call(
        self, inputs: Any, state: dict[str, Any], mask: Any = None, segment_ids: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        if segment_ids is None:
            return self.layer.call_with_state(inputs, state, mask=mask)
        return self.layer.call_with_state(inputs, state, mask=mask, segment_ids=segment_ids)

    def get_initial_state(self, batch_size: int) -> dict[str, Any]:
        """The state before the first position."""
        return self.layer.get_initial_state(batch_size)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "layer": keras.saving.serialize_keras_object(self.layer),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Streaming":
        layer = keras.saving.deserialize_keras_object(config.pop("layer"))
        return cls(layer, **config)
