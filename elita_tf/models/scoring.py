"""The losses and logits of given texts."""

from collections.abc import Callable
from typing import Any

from keras import ops

from elita_tf.models.inputs import mixer_tensors, require_ids, require_inputs
from elita_tf.ops import token_cross_entropy


class Scoring:
    """Mixin of a language model with a `backbone` and a `vocabulary_size`."""

    def token_losses(
        self, token_ids: Any, labels: Any, padding_mask: Any = None, segment_ids: Any = None
    ) -> Any:
        """The loss of every label, (batch, time) in nats, without holding all logits.

        That of a negative label is 0.
        """
        optional = {"padding_mask": padding_mask, "segment_ids": segment_ids}
        inputs = {"token_ids": token_ids, **optional}
        require_inputs(self.name, inputs, labels=labels)
        return self._losses_of(self.backbone(inputs, training=False), labels)

    def token_losses_with_state(
        self, token_ids: Any, labels: Any, state: dict[str, Any], segment_ids: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """`token_losses` of a text that goes on from `state`, and the state after it."""
        inputs = {"token_ids": token_ids, "segment_ids": segment_ids}
        require_inputs(self.name, inputs, labels=labels)
        hidden_states, state = self.backbone.call_with_state(inputs, state)
        return self._losses_of(hidden_states, labels), state

    def _losses_of(self, hidden_states: Any, labels: Any) -> Any:
        require_ids(self.name, self.vocabulary_size, labels=labels)
        labels = ops.convert_to_tensor(labels)
        kernel = self.backbone.output_kernel
        losses = token_cross_entropy(hidden_states, kernel, ops.maximum(labels, 0))
        # In a graph a label is not known before; XLA would take the last class for it.
        losses = ops.where(labels < self.vocabulary_size, losses, float("nan"))
        return ops.where(labels < 0, ops.zeros_like(losses), losses)

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
        require_ids(self.name, self.vocabulary_size, token_ids=token_ids)
        intercept, tensors = layer_intercept_fn or (lambda x, _: x), mixer_tensors(inputs)
        x = intercept(self.backbone.embed(token_ids, **tensors), -1)
        for i, block in enumerate(self.backbone.blocks):
            x = intercept(block(x, training=False, **tensors), i)
        hidden_states = self.backbone.final_norm(x)
        if scoring_mode == "loss":
            return self._losses_of(hidden_states, target_ids)
        return self.backbone.token_embedding(hidden_states, reverse=True)
