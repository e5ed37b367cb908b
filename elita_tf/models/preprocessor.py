"""Strings to token ids and back, for `ElitaCausalLM`."""

from typing import Any

import keras
import keras_hub
import tensorflow as tf

from elita_tf.data import ElitaGPT2Tokenizer, ElitaTokenizer
from elita_tf.models.backbone import ElitaBackbone
from elita_tf.packaged_presets import PackagedPresets

# KerasHub finds the tokenizer of a preset by its backbone. `elita_tf.data` knows no models.
ElitaTokenizer.backbone_cls = ElitaBackbone
ElitaGPT2Tokenizer.backbone_cls = ElitaBackbone


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
        x: a string, or a batch of strings.
        y: None, as the labels are the texts' own next tokens.
        sample_weight: optional, the weight of every text, (batch,): that of its tokens.
        sequence_length: in place of that of the preprocessor.

    Returns:
        `(x, y, sample_weight)` for `fit`: x a dict of `token_ids` and `padding_mask`, y the next
        tokens.

    Raises:
        ValueError: for anything but strings, for labels and for weights that are not one a text
            (in the call), and for a tokenizer with a `sequence_length` of its own.
    """

    backbone_cls = ElitaBackbone
    tokenizer_cls = ElitaTokenizer

    def build(self, input_shape: Any) -> None:
        if self.tokenizer.sequence_length:
            raise ValueError(
                "The preprocessor pads and cuts texts itself. Expected a tokenizer without "
                f"`sequence_length`; received one with {self.tokenizer.sequence_length}."
            )
        super().build(input_shape)

    def call(
        self, x: Any, y: Any = None, sample_weight: Any = None, sequence_length: int | None = None
    ) -> Any:
        require_no_labels(y)
        x, y, mask = super().call(x, sequence_length=sequence_length)
        return x, y, mask if sample_weight is None else _weighed(mask, sample_weight)

    def generate_preprocess(self, x: Any, sequence_length: int | None = None) -> dict[str, Any]:
        """Prompts as `token_ids` and `padding_mask`, padded at the end to `sequence_length`.

        Args:
            x: a string, or a batch of strings.
            sequence_length: length of the rows, by default that of the preprocessor.

        Raises:
            ValueError: outside a graph, for a prompt without a token or with more than
                `sequence_length` tokens, and for anything but strings.
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

    def _check_lengths(self, tokens: list, sequence_length: int) -> None:
        is_batch = bool(tokens) and isinstance(tokens[0], list)
        lengths = [len(row) + self.add_start_token for row in (tokens if is_batch else [tokens])]
        if min(lengths) == 0:
            raise ValueError(
                f"Prompt {lengths.index(0)} is empty, so there is nothing to continue. Pass some "
                "text, or a preprocessor with `add_start_token=True`."
            )
        if max(lengths) > sequence_length:
            raise ValueError(
                f"Prompt {lengths.index(max(lengths))} has {max(lengths)} tokens, more than the "
                f"`max_length` of {sequence_length} for prompt and continuation together. Pass a "
                "larger `max_length` or a shorter prompt."
            )

    def generate_postprocess(self, x: dict[str, Any]) -> Any:
        """The texts of generated ids, without padding, start and end token.

        Args:
            x: `token_ids` and `padding_mask`, (batch, time), or (time,) for a single text.
        """
        if not self.built:
            self.build(None)
        token_ids, mask = x["token_ids"], x["padding_mask"]
        if tf.executing_eagerly():
            token_ids, mask = map(keras.ops.convert_to_numpy, (token_ids, mask))
        is_batch = len(token_ids.shape) == 2
        if not is_batch:
            token_ids, mask = token_ids[None], mask[None]
        count = tf.cumsum(tf.cast(mask, tf.int32), axis=1)
        dropped = (count == count[:, -1:]) & (token_ids == self.tokenizer.end_token_id)
        if self.add_start_token:
            dropped |= (count == 1) & (token_ids == self.tokenizer.start_token_id)
        kept = tf.ragged.boolean_mask(tf.cast(token_ids, tf.int32), tf.cast(mask, bool) & ~dropped)
        texts = self.tokenizer.detokenize(kept)
        return texts if is_batch else texts[0]


def require_no_labels(y: Any) -> None:
    """Raise a ValueError for labels of texts."""
    if y is not None:
        raise ValueError(
            "The labels of a text are its own next tokens, so a text model takes no labels; "
            f"received y of type {type(y).__name__}. Leave it out."
        )


def _weighed(mask: Any, sample_weight: Any) -> Any:
    """The weights of tokens, (batch, time): 0 at padding, elsewhere the weight of the text."""
    mask, weights = (tf.cast(each, "float32") for each in (mask, sample_weight))
    if len(weights.shape) != len(mask.shape) - 1:
        raise ValueError(
            "`sample_weight` weighs texts: expected a number for each of them, (batch,), received "
            f"shape {tuple(weights.shape)}. Token ids can have weights of their own: pass "
            "`preprocessor=None` and tokenize before."
        )
    weights = mask * weights[..., None]
    return keras.ops.convert_to_tensor(weights) if tf.executing_eagerly() else weights
