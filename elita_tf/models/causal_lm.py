"""The decoder with its loss, its recurrent state and its text generation."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import keras_hub
from keras import ops

from elita_tf.models.backbone import ElitaBackbone, OptionalPaddingMask
from elita_tf.models.buckets import in_buckets
from elita_tf.models.preprocessor import ElitaCausalLMPreprocessor
from elita_tf.ops import linear_cross_entropy, token_cross_entropy
from elita_tf.schedules import CappedInverseSqrt


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaCausalLM(OptionalPaddingMask, keras_hub.models.CausalLM):
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
    >>> logits, state = model.prefill(windows)
    >>> logits, state = model.step(np.argmax(logits, axis=-1), state)
    >>> tuple(logits.shape)
    (2, 50)
    """

    backbone_cls = ElitaBackbone
    preprocessor_cls = ElitaCausalLMPreprocessor

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
            **kwargs: of `keras_hub.models.CausalLM.compile`, `sampler` among them.
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

    def score(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        scoring_mode: str = "logits",
        layer_intercept_fn: Callable[[Any, int], Any] = lambda x, index: x,
        target_ids: Any = None,
    ) -> Any:
        """The logits, or the losses, of given ids, as KerasHub's models score them.

        Args:
            token_ids: (batch, time).
            padding_mask: optional boolean (batch, time).
            scoring_mode: "logits" or "loss".
            layer_intercept_fn: `(x, index) -> x`, applied to the embeddings (index -1) and to the
                output of every block.
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
        state = self.backbone.get_initial_state(ops.shape(token_ids)[0])
        hidden_states, _ = self.backbone.call_with_state(inputs, state, layer_intercept_fn)
        if scoring_mode == "loss":
            return token_cross_entropy(hidden_states, self.backbone.output_kernel, target_ids)
        return self.backbone.token_embedding(hidden_states, reverse=True)

    def prefill(
        self, token_ids: Any, padding_mask: Any = None, state: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Read a prompt, in the parallel form.

        Args:
            token_ids: (batch, time).
            padding_mask: optional boolean (batch, time); padding may stand on either side.
            state: where to go on from, by default the beginning.

        Returns:
            The logits of the token after the last real one, (batch, vocabulary_size), and the
            state: a flat dict of arrays, the batch first, that can be stored and fed back.
        """
        batch_size, time = ops.shape(token_ids)
        if state is None:
            state = self.backbone.get_initial_state(batch_size)
        inputs = {"token_ids": token_ids, "padding_mask": padding_mask}
        hidden_states, state = self.backbone.call_with_state(inputs, state)
        if padding_mask is None:
            last = hidden_states[:, -1:]
        else:
            index = ops.max(ops.where(padding_mask, ops.arange(time), 0), axis=1)
            last = ops.take_along_axis(hidden_states, index[:, None, None], axis=1)
        return self.backbone.token_embedding(last, reverse=True)[:, 0], state

    def step(self, token_ids: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Read one token: the logits of the next one, (batch, vocabulary_size), and the state.

        Args:
            token_ids: (batch,).
            state: of `prefill`, or of the step before.
        """
        return self.prefill(ops.expand_dims(token_ids, 1), state=state)

    def generate_step(
        self, inputs: dict[str, Any], stop_token_ids: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Fill up one batch of prompts with the compiled sampler; what `generate` compiles.

        Args:
            inputs: `token_ids` and `padding_mask`, (batch, max_length), padded at the end. Columns
                that are padding in every row may come before.
            stop_token_ids: a row ends at the first of these that is not of its prompt.
        """
        token_ids, prompts = inputs["token_ids"], ops.cast(inputs["padding_mask"], "bool")
        batch_size, max_length = ops.shape(token_ids)
        columns = ops.arange(max_length, dtype="int32")
        start = ops.min(ops.argmax(ops.cast(prompts, "int32"), axis=1))
        shortest = ops.min(ops.sum(ops.cast(prompts, "int32"), axis=1))
        index = ops.cast(start, "int32") + shortest
        # The step before `index` reads the last token that all rows have.
        seen = {"token_ids": token_ids, "padding_mask": prompts & (columns < index - 1)}
        state = self.backbone.get_initial_state(batch_size)
        _, state = self.backbone.call_with_state(seen, state)

        def advance(tokens: Any, state: dict[str, Any], index: Any) -> tuple[Any, Any, Any]:
            last = ops.slice(tokens, [0, index - 1], [ops.shape(tokens)[0], 1])
            hidden, state = self.backbone.call_with_state({"token_ids": last}, state)
            logits = self.backbone.token_embedding(hidden, reverse=True)
            return logits[:, 0], hidden[:, 0], state

        fixed = prompts | (columns < start)
        token_ids = self.sampler(
            next=advance,
            prompt=token_ids,
            cache=state,
            index=index,
            mask=fixed,
            stop_token_ids=stop_token_ids,
            # Only contrastive search reads them; otherwise they are never computed in a graph.
            hidden_states=self.backbone(inputs),
            model=self,
        )
        ended = ops.zeros_like(fixed)
        for stop in stop_token_ids or ():
            ended = ended | (~fixed & (token_ids == stop))
        after_end = ops.cumsum(ops.cast(ended, "int32"), axis=1) - ops.cast(ended, "int32") > 0
        return {"token_ids": token_ids, "padding_mask": ~after_end & (columns >= start)}

    def make_generate_function(self) -> Callable[..., dict[str, Any]]:
        """The compiled `generate_step`: one compilation for a bucket of lengths."""
        if self.generate_function is None:
            self.generate_function = in_buckets(super().make_generate_function())
        return self.generate_function
