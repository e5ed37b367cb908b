"""The decoder with its loss."""

from typing import Any

import keras
import keras_hub

from elita_tf.models.backbone import ElitaBackbone, OptionalPaddingMask
from elita_tf.ops import linear_cross_entropy, token_cross_entropy
from elita_tf.schedules import CappedInverseSqrt


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaCausalLM(OptionalPaddingMask, keras_hub.models.CausalLM):
    """A causal language model on an `ElitaBackbone`, trained with `fit` on windows of token ids.

    Calling it gives logits. `fit` and `evaluate` need none: their loss is the mean cross-entropy
    in nats per token, weights included, through `linear_cross_entropy`, which never holds the
    (tokens, vocabulary) logits.

    Args:
        backbone: an `ElitaBackbone`.
        preprocessor: None, for inputs that are token ids already.
        **kwargs: of `keras_hub.models.CausalLM`.

    Inputs:
        As for `ElitaBackbone`.

    Returns:
        The logits (batch, time, vocabulary_size).

    Example:

    >>> import numpy as np
    >>> from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures
    >>> backbone = ElitaBackbone(vocabulary_size=50, **architectures["elita_query"])
    >>> model = ElitaCausalLM(backbone)
    >>> windows = np.arange(2 * 9).reshape(2, 9) % 50
    >>> history = model.fit({"token_ids": windows[:, :-1]}, windows[:, 1:], verbose=0)
    >>> history.history["loss"][0] < 5  # log 50 is 3.9
    True
    """

    backbone_cls = ElitaBackbone

    def __init__(self, backbone: ElitaBackbone, preprocessor: Any = None, **kwargs: Any) -> None:
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional model ===
        hidden_states = backbone(backbone.input)
        logits = backbone.token_embedding(hidden_states, reverse=True)
        super().__init__(inputs=backbone.input, outputs=logits, **kwargs)

    def compile(
        self,
        optimizer: Any = "auto",
        loss: Any = "auto",
        *,
        weighted_metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        """As in Keras, with other defaults.

        Args:
            optimizer: "auto" is ELiTA's Adam(min(1e-3, 1e-2 / sqrt(step)), 0.9, 0.99).
            loss: "auto" is `linear_cross_entropy`; any other loss gets the logits.
            weighted_metrics: by default none: a metric needs the logits.
            **kwargs: of `keras_hub.models.CausalLM.compile`.
        """
        if optimizer == "auto":
            optimizer = keras.optimizers.Adam(CappedInverseSqrt(), beta_1=0.9, beta_2=0.99)
        super().compile(
            optimizer=optimizer,
            loss=None if loss == "auto" else loss,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as saved, so that a reloaded model goes on with its optimizer's state."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        if self.loss is not None:
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        # The logits of `y_pred` stay unused, so a compiled step never computes them.
        hidden_states = self.backbone(x, training=training)
        loss = linear_cross_entropy(hidden_states, self.backbone.output_kernel, y, sample_weight)
        return sum(self.losses, loss)

    def token_losses(self, token_ids: Any, labels: Any, padding_mask: Any = None) -> Any:
        """The loss of every label, (batch, time) in nats, without holding all logits."""
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        hidden_states = self.backbone(inputs, training=False)
        return token_cross_entropy(hidden_states, self.backbone.output_kernel, labels)
