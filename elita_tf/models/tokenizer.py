"""The tokenizers of `ElitaCausalLM`, as KerasHub layers: in Python and in graphs."""

from functools import cached_property
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from elita_tf.models.backbone import ElitaBackbone
from elita_tf.models.presets import PackagedPresets

# SentencePiece writes a space as this character, so that the character itself needs its bytes.
_SPACE_MARK = "\u2581"


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaTokenizer(PackagedPresets, keras_hub.tokenizers.SentencePieceTokenizer):
    r"""SentencePiece with the ids of `elita_tf.data`, line ends and every character kept.

    A model that has the piece `"\n"` is lossless. With any other one, `</s>` stands for the line
    end, and a text starts after one.

    Args:
        proto: the serialised SentencePiece model, or the path of its file.
        **kwargs: of `keras_hub.tokenizers.SentencePieceTokenizer`.

    Call arguments:
        inputs: a string, or a batch of strings.

    Returns:
        The token ids, a row per string.

    Source: Kudo and Richardson 2018, arXiv:1808.06226.
    """

    backbone_cls = ElitaBackbone

    def __init__(self, proto: bytes | str | None = None, **kwargs: Any) -> None:
        self._add_special_token("<s>", "start_token")
        self._add_special_token("</s>", "end_token")
        self.pad_token_id = 0
        super().__init__(proto=proto, **kwargs)

    def set_proto(self, proto: bytes | str | None) -> None:
        """Take another SentencePiece model."""
        try:
            super().set_proto(proto)
        except (RuntimeError, tf.errors.OpError) as error:
            raise ValueError(
                f"`proto` is no SentencePiece model, but {len(proto)} bytes of something else, or "
                f"cut short: {error}. Pass the content, or the path, of a whole `.model` file."
            ) from error
        if proto is None:
            return
        self._lossless = self.token_to_id("\n") != self.token_to_id("<unk>")
        # What SentencePiece would lose, and the ids that stand for it.
        if self._lossless:
            pieces = [f"<0x{byte:02X}>" for byte in _SPACE_MARK.encode()]
            self._separator = _SPACE_MARK
            self._separator_ids = [self.token_to_id(piece) for piece in pieces]
        else:
            self._separator = "\n"
            self._separator_ids = [self.end_token_id]
            self.start_token, self.start_token_id = self.end_token, self.end_token_id

    def tokenize(self, inputs: Any) -> Any:
        """The ids of a string, or of every string of a batch."""
        if not tf.executing_eagerly():
            self._revive()
            return self._tokenize_in_graph(tf.convert_to_tensor(inputs))
        # Of NumPy's own strings, trailing NULs are lost.
        texts = np.asarray(inputs, dtype=object)
        rows = [self._tokenize_text(text) for text in np.ravel(texts)]
        return rows if texts.ndim else rows[0]

    def detokenize(self, inputs: Any) -> Any:
        """The text of ids, or of every row of ids."""
        if not tf.executing_eagerly():
            self._revive()
        if self._lossless:
            return super().detokenize(inputs)
        if not tf.executing_eagerly():
            return self._detokenize_in_graph(inputs)
        rows = inputs.to_list() if isinstance(inputs, tf.RaggedTensor) else list(inputs)
        if not rows or np.ndim(rows[0]) == 0:
            return self._detokenize_row(rows)
        return [self._detokenize_row(row) for row in rows]

    def _revive(self) -> None:
        """Load the model into TensorFlow again if TensorFlow has dropped it.

        TensorFlow Text's model belongs to a kernel that `keras.utils.set_random_seed`, for one,
        clears from a cache.
        """
        with tf.init_scope():
            try:
                self._sentence_piece.tokenize([""])
            except tf.errors.NotFoundError:
                self.set_proto(self.proto)

    def _tokenize_text(self, text: Any) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else str(text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"A text is no Unicode: {error}. Read it with its encoding."
            ) from error
        first, *rest = super().tokenize(text.split(self._separator))
        return first + [token for ids in rest for token in self._separator_ids + ids]

    def _detokenize_row(self, row: Any) -> str:
        lines: list[list[int]] = [[]]
        for token in map(int, row):
            lines.append([]) if token == self.end_token_id else lines[-1].append(token)
        return "\n".join(super().detokenize(lines))

    def _tokenize_in_graph(self, texts: tf.Tensor) -> tf.Tensor | tf.RaggedTensor:
        parts = tf.strings.split(tf.reshape(texts, [-1]), self._separator)
        tokens = super().tokenize(parts.flat_values)
        is_first = tf.equal(
            tf.range(tf.size(parts.flat_values), dtype=parts.row_splits.dtype),
            tf.gather(parts.row_starts(), parts.value_rowids()),
        )
        count = len(self._separator_ids)
        separators = tf.RaggedTensor.from_row_lengths(
            tf.tile(self._separator_ids, [tf.reduce_sum(tf.cast(~is_first, tf.int32))]),
            tf.where(is_first, tf.constant(0, tf.int64), tf.constant(count, tf.int64)),
        )
        joined = tf.concat([separators, tokens], axis=1)
        rows = parts.with_values(joined).merge_dims(1, 2)
        return rows if texts.shape.rank else rows[0]

    def _detokenize_in_graph(self, rows: tf.RaggedTensor) -> tf.Tensor:
        is_end = tf.equal(rows.flat_values, self.end_token_id)
        # Every row starts a line, and so does what follows an end.
        line = tf.cumsum(tf.cast(is_end, tf.int64), exclusive=True) + rows.value_rowids()
        ends = tf.reduce_sum(tf.cast(rows.with_values(is_end), tf.int64), axis=1)
        lines = tf.RaggedTensor.from_value_rowids(
            rows.flat_values[~is_end], line[~is_end], nrows=tf.reduce_sum(ends + 1)
        )
        # TensorFlow's own separator would be missing after leading empty strings.
        texts = tf.RaggedTensor.from_row_lengths("\n" + super().detokenize(lines), ends + 1)
        joined = tf.strings.reduce_join(texts, axis=1)
        length = tf.strings.length(joined)
        return tf.strings.substr(joined, tf.ones_like(length), length - 1)


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaGPT2Tokenizer(keras_hub.models.GPT2Tokenizer):
    """GPT-2's byte-level BPE through KerasHub, always by its TensorFlow path.

    KerasHub's Python path splits words in another way than GPT-2 does ("'s" for one).

    Args:
        vocabulary: dict from tokens to ids, or the path of a `vocab.json`.
        merges: list of merges, or the path of a `merges.txt`.
        **kwargs: of `keras_hub.models.GPT2Tokenizer`.

    Call arguments:
        inputs: a string, or a batch of strings.

    Returns:
        The token ids, a row per string.

    Source: Radford et al. 2019 (GPT-2).
    """

    backbone_cls = ElitaBackbone

    def __init__(self, vocabulary: Any = None, merges: Any = None, **kwargs: Any) -> None:
        kwargs["_allow_python_workflow"] = False
        super().__init__(vocabulary=vocabulary, merges=merges, **kwargs)

    def detokenize(self, inputs: Any) -> Any:
        """The text of ids, or of every row of ids; bytes that are no UTF-8 become U+FFFD."""
        if not tf.executing_eagerly():
            return tf.strings.unicode_transcode(super().detokenize(inputs), "UTF-8", "UTF-8")
        rows = inputs.to_list() if isinstance(inputs, tf.RaggedTensor) else list(inputs)
        is_batch = not rows or np.ndim(rows[0]) > 0
        ragged = tf.ragged.constant(rows if is_batch else [rows], tf.int32, ragged_rank=1)
        texts = [text.decode() for text in self._graph(ragged).numpy()]
        return texts if is_batch else texts[0]

    @cached_property
    def _graph(self) -> Any:
        # In Python, KerasHub would drop the bytes.
        rows = tf.RaggedTensorSpec([None, None], tf.int32)
        return tf.function(self.detokenize, input_signature=[rows])
