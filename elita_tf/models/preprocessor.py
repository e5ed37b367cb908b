"""Strings to token ids and back, for `ElitaCausalLM`."""

from typing import Any

import keras
import keras_hub
import tensorflow as tf

from elita_tf.models.backbone import ElitaBackbone
from elita_tf.models.presets import PackagedPresets
from elita_tf.models.tokenizer import ElitaTokenizer


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaCausalLMPreprocessor(PackagedPresets, keras_hub.models.CausalLMPreprocessor):
    """Tokenizes strings into padded windows for `fit`, and prompts for `generate`.

    Args:
        tokenizer: an `ElitaTokenizer` or an `ElitaGPT2Tokenizer`.
        sequence_length: tokens in a training window, and the default `max_length` of `generate`.
        add_start_token: begin every text with the start token, prompts included. A model trained
            on windows cut from running text, as `elita train` does, has seen none.
        add_end_token: end every training text with the end token.
        **kwargs: of `keras_hub.models.CausalLMPreprocessor`.

    Call arguments:
        x: a batch of strings.

    Returns:
        `(x, y, sample_weight)` for `fit`: x a dict of `token_ids` and `padding_mask`, y the next
        tokens.
    """

    backbone_cls = ElitaBackbone
    tokenizer_cls = ElitaTokenizer

    def generate_preprocess(self, x: Any, sequence_length: int | None = None) -> dict[str, Any]:
        """Prompts as `token_ids` and `padding_mask`, padded at the end to `sequence_length`.

        Raises:
            ValueError: outside a graph, for a prompt of no token or of more than
                `sequence_length`.
        """
        if not self.built:
            self.build(None)
        sequence_length = sequence_length or self.sequence_length
        tokens = self.tokenizer(x)
        if tf.executing_eagerly():
            self._check_lengths(tokens, sequence_length)
        token_ids, padding_mask = self.packer(
            tokens,
            sequence_length=sequence_length,
            add_start_value=self.add_start_token,
            add_end_value=False,
        )
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def _check_lengths(self, tokens: Any, sequence_length: int) -> None:
        rows = tokens if len(tokens) and hasattr(tokens[0], "__len__") else [tokens]
        lengths = [len(row) + self.add_start_token for row in rows]
        if min(lengths) == 0:
            raise ValueError(
                f"Prompt {lengths.index(0)} is empty, and there is nothing to go on from. Pass "
                "some text, or a preprocessor with `add_start_token=True`."
            )
        if max(lengths) > sequence_length:
            raise ValueError(
                f"Prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, more than the "
                f"`max_length` of {sequence_length} for prompt and continuation together. Pass a "
                "larger `max_length` or a shorter prompt."
            )

    def generate_postprocess(self, x: dict[str, Any]) -> Any:
        """The texts of generated ids, without padding, start and end token."""
        if not self.built:
            self.build(None)
        token_ids, mask = x["token_ids"], x["padding_mask"]
        if tf.executing_eagerly():
            token_ids, mask = map(keras.ops.convert_to_numpy, (token_ids, mask))
        count = tf.cumsum(tf.cast(mask, tf.int32), axis=1)
        dropped = (count == count[:, -1:]) & (token_ids == self.tokenizer.end_token_id)
        if self.add_start_token:
            dropped |= (count == 1) & (token_ids == self.tokenizer.start_token_id)
        kept = tf.ragged.boolean_mask(tf.cast(token_ids, tf.int32), tf.cast(mask, bool) & ~dropped)
        return self.tokenizer.detokenize(kept.to_list() if tf.executing_eagerly() else kept)
