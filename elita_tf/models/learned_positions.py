"""Learned embeddings of absolute positions, as in GPT-2."""

from typing import Any

import keras
from keras import ops

from elita_tf.layers.segments import number_segments, positions_of
from elita_tf.ops.arguments import require_positive


@keras.saving.register_keras_serializable(package="elita_tf")
class LearnedPositions(keras.layers.Layer):
    """One learned vector per absolute position; those beyond the last share the last one's.

    Args:
        num_positions: number of positions that have a vector of their own.
        hidden_dim: width.

    Call arguments:
        token_ids: (batch, time), of which only the shape counts.
        mask: optional boolean (batch, time); a masked position advances nothing.
        offset: optional int32 (batch,), the real positions before these.
        segment_ids: optional integers (batch, time); each segment but the first counts from 0.

    Returns:
        (batch or 1, time, hidden).

    Example:

    >>> import numpy as np
    >>> from elita_tf.models.learned_positions import LearnedPositions
    >>> tuple(LearnedPositions(num_positions=16, hidden_dim=8)(np.ones((2, 5))).shape)
    (1, 5, 8)

    Source: Radford et al. 2019 (GPT-2).
    """

    def __init__(self, num_positions: int, hidden_dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        require_positive("LearnedPositions", num_positions=num_positions, hidden_dim=hidden_dim)
        self.num_positions = num_positions
        self.hidden_dim = hidden_dim
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        # GPT-2's own spread: positions change a token's embedding, they do not drown it.
        initializer = keras.initializers.RandomNormal(stddev=0.01)
        shape = (self.num_positions, self.hidden_dim)
        self.embeddings = self.add_weight(shape, initializer, name="embeddings")

    def call(
        self, token_ids: Any, mask: Any = None, offset: Any = None, segment_ids: Any = None
    ) -> Any:
        segments = number_segments(segment_ids, mask)
        positions, _ = positions_of(token_ids, offset, mask, segments)
        embeddings = ops.cast(self.embeddings, self.compute_dtype)
        return ops.take(embeddings, ops.clip(positions, 0, self.num_positions - 1), axis=0)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return (None, input_shape[1], self.hidden_dim)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "num_positions": self.num_positions,
            "hidden_dim": self.hidden_dim,
        }
