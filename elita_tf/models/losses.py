"""What counts in the loss, and by how much."""

from typing import Any

import keras
from keras import ops

from elita_tf.ops.arguments import require_shapes


class TokenMean(keras.metrics.Mean):
    """The loss that `fit` and `evaluate` report: a mean over tokens, whatever the batches are.

    Keras gives the loss of a batch, and the number of rows as its weight. But rows can differ in
    their number of tokens, so the model gives the right weight first, with `weigh_batch`.
    """

    def __init__(self) -> None:
        # In 16 bits a sum over tokens would end at 2,048 or 65,504.
        super().__init__(name="loss", dtype="float32")
        self._batch_weight = self.add_variable((), keras.initializers.Zeros(), name="batch_weight")
        self._is_weighed = False

    def weigh_batch(self, weight: Any) -> None:
        """Say what the next loss weighs, in place of the number of rows."""
        self._batch_weight.assign(ops.cast(weight, self.dtype))
        self._is_weighed = True

    def update_state(self, values: Any, sample_weight: Any = None) -> None:
        super().update_state(values, self._batch_weight if self._is_weighed else sample_weight)


def token_weights(
    model: str, labels: Any, weights: Any = None, padding_mask: Any = None
) -> Any | None:
    """The weight of every label, (batch, time), or None if all count alike.

    Args:
        model: for the messages.
        labels: (batch, time), or (batch, time, classes).
        weights: optional, (batch, time), (batch, 1) or (batch,), which is one for a row. By
            default labels at padded positions have weight 0, and all others 1.
        padding_mask: optional boolean (batch, time).
    """
    weights = padding_mask if weights is None else weights
    if weights is None:
        return None
    weights = ops.convert_to_tensor(weights)
    if len(weights.shape) == 1:
        weights = weights[:, None]
    axes = "batch 1" if weights.shape[-1] == 1 else "batch time"
    classes = " classes" * (len(labels.shape) - 2)
    require_shapes(model, labels=(labels, f"batch time{classes}"), sample_weight=(weights, axes))
    return ops.broadcast_to(weights, ops.shape(labels)[:2])


def weigh_labels(
    model: str, labels: Any, weights: Any = None, padding_mask: Any = None
) -> tuple[Any, Any]:
    """Labels that are not negative, and the weights that leave the negative ones out.

    Args:
        model: for the messages.
        labels: integers (batch, time).
        weights: as for `token_weights`.
        padding_mask: as for `token_weights`.
    """
    labels = ops.convert_to_tensor(labels)
    weights = token_weights(model, labels, weights, padding_mask)
    real = labels >= 0
    if weights is not None:
        real = ops.where(real, weights, ops.zeros_like(weights))
    return ops.maximum(labels, 0), real


def weight_of_batch(labels: Any, weights: Any | None, reduction: str | None) -> Any:
    """What the mean of a loss of Keras was divided by: the weight of its batch.

    Args:
        labels: (batch, time) or more axes.
        weights: (batch, time) or None.
        reduction: of the loss. Only "mean_with_sample_weight" divides by the weights; the others
            count the labels.
    """
    if reduction == "mean_with_sample_weight" and weights is not None:
        return ops.sum(ops.cast(weights, "float32"))
    batch_size, time = ops.shape(labels)[:2]
    return ops.cast(batch_size * time, "float32")
