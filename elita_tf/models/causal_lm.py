"""The decoder with its loss."""

from collections.abc import Callable
from typing import Any

import keras
import keras_hub
from keras import ops

from elita_tf.layers.arguments import require_flag
from elita_tf.models.backbone import ElitaBackbone
from elita_tf.models.carried_state import CarriedState
from elita_tf.models.generation import Generation
from elita_tf.models.padding import OptionalInputs, require_inputs
from elita_tf.models.preprocessor import ElitaCausalLMPreprocessor
from elita_tf.models.training import Training
from elita_tf.ops import token_cross_entropy
from elita_tf.packaged_presets import PackagedPresets


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaCausalLM(
    PackagedPresets, OptionalInputs, Training, Generation, keras_hub.models.CausalLM
):
    """A causal language model on an `ElitaBackbone`: `fit`, `generate`, `prefill` and `step`.

    Calling it gives logits. `fit` and `evaluate` need none: their loss is the mean cross-entropy
    in nats per token, weights included, through `linear_cross_entropy`, which never holds the
    (tokens, vocabulary) logits.

    Generation reads the prompt in the parallel form and goes on one step a token. What it keeps
    of the past is the blocks' state, whose size does not depend on the length.

    Args:
        backbone: an `ElitaBackbone`.
        preprocessor: an `ElitaCausalLMPreprocessor`, for strings; None for inputs that are token
            ids already.
        carried_batch_size: train each batch from the state that the one before left (truncated
            backpropagation through time: no gradient goes into earlier batches). Every batch has
            this size, and its rows go on where those of the last one ended, as in
            `elita_tf.data.stream_windows`. None starts every batch anew.
        rematerialize: keep the residual stream alone for the backward pass, which computes every
            mixer and feed-forward again: for models that are deep or texts that are long.
        **kwargs: of `keras_hub.models.CausalLM`.

    Inputs:
        As for `ElitaBackbone`.

    Returns:
        The logits (batch, time, vocabulary_size).

    Raises:
        ValueError: `carried_batch_size` together with `rematerialize`, or anything else than a
            backbone and a preprocessor.

    Example:

    >>> import numpy as np
    >>> from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures
    >>> arguments = {**architectures["elita_query"], "num_layers": 1}
    >>> model = ElitaCausalLM(ElitaBackbone(vocabulary_size=50, **arguments))
    >>> model.compile(jit_compile=False)  # for a single step
    >>> windows = np.arange(2 * 9).reshape(2, 9) % 50
    >>> history = model.fit({"token_ids": windows[:, :-1]}, windows[:, 1:], verbose=0)
    >>> history.history["loss"][0] < 5  # log 50 is 3.9
    True
    >>> logits, state = model.prefill(windows)
    >>> logits, state = model.step(np.argmax(logits, axis=-1), state)
    >>> tuple(logits.shape)
    (2, 50)
    """

    backbone_cls = ElitaBackbone
    preprocessor_cls = ElitaCausalLMPreprocessor

    def __init__(
        self,
        backbone: ElitaBackbone,
        preprocessor: Any = None,
        carried_batch_size: int | None = None,
        rematerialize: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(backbone, ElitaBackbone):
            raise ValueError(f"Expected an ElitaBackbone; received {backbone!r}.")
        if not hasattr(preprocessor, "generate_preprocess") and preprocessor is not None:
            raise ValueError(
                "`preprocessor` of ElitaCausalLM: expected an ElitaCausalLMPreprocessor, or None "
                f"for inputs that are token ids; received {preprocessor!r}."
            )
        require_flag("ElitaCausalLM", rematerialize=rematerialize)
        if rematerialize and carried_batch_size is not None:
            raise ValueError(
                "A carried state leaves the branches that `rematerialize` runs twice. Received "
                f"rematerialize=True and carried_batch_size={carried_batch_size}; pass one of them."
            )
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor
        self.carried_state = None
        if carried_batch_size is not None:
            self.carried_state = CarriedState(backbone, carried_batch_size)

        # `compile` asks for it.
        self.rematerialize = rematerialize

        # === Functional model ===
        hidden_states = backbone(backbone.input)
        logits = backbone.token_embedding(hidden_states, reverse=True)
        super().__init__(inputs=backbone.input, outputs=logits, **kwargs)

        # === Config ===
        self.carried_batch_size = carried_batch_size

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "carried_batch_size": self.carried_batch_size,
            "rematerialize": self.rematerialize,
        }

    def token_losses(
        self, token_ids: Any, labels: Any, padding_mask: Any = None, segment_ids: Any = None
    ) -> Any:
        """The loss of every label, (batch, time) in nats, without holding all logits."""
        optional = {"padding_mask": padding_mask, "segment_ids": segment_ids}
        inputs = {"token_ids": token_ids, **optional}
        require_inputs(self.name, inputs, labels=labels)
        hidden_states = self.backbone(inputs, training=False)
        return token_cross_entropy(hidden_states, self.backbone.output_kernel, labels)

    def token_losses_with_state(
        self, token_ids: Any, labels: Any, state: dict[str, Any], segment_ids: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """`token_losses` of a text that goes on from `state`, and the state after it."""
        inputs = {"token_ids": token_ids, "segment_ids": segment_ids}
        require_inputs(self.name, inputs, labels=labels)
        hidden_states, state = self.backbone.call_with_state(inputs, state)
        return token_cross_entropy(hidden_states, self.backbone.output_kernel, labels), state

    def score(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        scoring_mode: str = "logits",
        layer_intercept_fn: Callable[[Any, int], Any] | None = None,
        target_ids: Any = None,
    ) -> Any:
        """The logits, or the losses, of given ids, as KerasHub's models score them.

        Args:
            token_ids: (batch, time).
            padding_mask: optional boolean (batch, time).
            scoring_mode: "logits" or "loss".
            layer_intercept_fn: optional `(x, index) -> x`, applied to the embeddings (index -1) and
                to the output of every block.
            target_ids: (batch, time), for "loss".

        Returns:
            (batch, time, vocabulary_size), or (batch, time) in nats.

        Raises:
            ValueError: another mode, or "loss" without targets.
        """
        if scoring_mode not in ("logits", "loss"):
            raise ValueError(
                f"`scoring_mode`: expected 'logits' or 'loss', received {scoring_mode!r}."
            )
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError("`scoring_mode='loss'` compares with `target_ids`; received None.")
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        targets = {} if target_ids is None else {"target_ids": target_ids}
        require_inputs(self.name, inputs, **targets)
        state = self.backbone.get_initial_state(ops.shape(token_ids)[0])
        intercept = layer_intercept_fn or (lambda x, index: x)
        hidden_states, _ = self.backbone.call_with_state(inputs, state, intercept)
        if scoring_mode == "loss":
            return token_cross_entropy(hidden_states, self.backbone.output_kernel, target_ids)
        return self.backbone.token_embedding(hidden_states, reverse=True)
