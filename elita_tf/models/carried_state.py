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
        self.batch_size = batch_size
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
            for name, leaf in _empty(backbone, batch_size).items()
        }
        self.built = True

    @property
    def advice(self) -> str:
        """What to do about a batch of another size."""
        return (
            f"Every training batch has `carried_batch_size`={self.batch_size} rows, which go on "
            "where those of the batch before ended. Leave out a last batch of fewer rows, as "
            f"dataset.batch({self.batch_size}, drop_remainder=True) does, and pass `fit` of arrays "
            f"batch_size={self.batch_size} and a multiple of so many rows."
        )

    def require_rows(self, rows: int | None) -> None:
        """Raise a ValueError for a batch of other rows; None are rows that are not known yet."""
        if rows not in (None, self.batch_size):
            raise ValueError(f"Received a batch of {rows} rows. {self.advice}")

    def reset(self, backbone: Any) -> None:
        """Go back to the empty state."""
        self.write(_empty(backbone, self.batch_size))

    def read(self) -> dict[str, Any]:
        """The state that the last batch left."""
        return {name: ops.convert_to_tensor(leaf) for name, leaf in self._leaves.items()}

    def write(self, state: dict[str, Any]) -> None:
        """Keep a state; no gradient goes through it."""
        for name, leaf in self._leaves.items():
            leaf.assign(ops.stop_gradient(state[name]))


def _empty(backbone: Any, batch_size: int) -> dict[str, Any]:
    # Any number will do for the segment of the empty state. Batches without segments keep it.
    segment_id = {SEGMENT_ID: ops.zeros((batch_size,), "int32")}
    return {**backbone.get_initial_state(batch_size), **segment_id}
