"""The state that goes from one training batch to the next."""

from typing import Any

import keras
from keras import ops

from elita_tf.layers.segments import SEGMENT_ID
from elita_tf.ops.arguments import require_positive


class CarriedState(keras.layers.Layer):
    """The state of a backbone, in variables that are not trained.

    Args:
        backbone: an `ElitaBackbone`.
        batch_size: rows of the state.
    """

    def __init__(self, backbone: Any, batch_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_positive("CarriedState", batch_size=batch_size)
        # Any number will do for the empty state. Batches without segments keep it.
        segment_id = {SEGMENT_ID: ops.zeros((batch_size,), "int32")}
        self._leaves = {
            name: self.add_weight(
                tuple(leaf.shape),
                # A leaf may start at minus infinity, so its own first value initialises it.
                initializer=lambda shape, dtype, leaf=leaf: ops.cast(leaf, dtype),
                dtype=leaf.dtype,
                trainable=False,
                autocast=False,
                name=name,
            )
            for name, leaf in {**backbone.get_initial_state(batch_size), **segment_id}.items()
        }
        self.built = True

    def read(self) -> dict[str, Any]:
        """The state that the last batch left."""
        return {name: ops.convert_to_tensor(leaf) for name, leaf in self._leaves.items()}

    def write(self, state: dict[str, Any]) -> None:
        """Keep a state; no gradient goes through it."""
        for name, leaf in self._leaves.items():
            leaf.assign(ops.stop_gradient(state[name]))
