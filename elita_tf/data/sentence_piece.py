"""SentencePiece (Kudo and Richardson, 2018, arXiv:1808.06226): for corpora and for models."""

import itertools
from typing import Any

import keras
import keras_hub
import tensorflow as tf
from sentencepiece import SentencePieceProcessor

from elita_tf.data.tokenizer_base import Tokenizer
from elita_tf.packaged_presets import PackagedPresets

SENTENCEPIECE_FILE = "sentencepiece.model"
# SentencePiece writes a space as this character. The character itself is written as its bytes.
SPACE_MARK = "\u2581"


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaTokenizer(Tokenizer, PackagedPresets, keras_hub.tokenizers.SentencePieceTokenizer):
    r"""SentencePiece that keeps line ends and every character.

    A model that has the piece `"\n"` is lossless (see `train_sentencepiece`). With any other
    model, `</s>` stands for the line end: a text has one more line than line ends, so one more
    `</s>` ends a split, and a text for a model starts after one.

    Only graphs need TensorFlow Text.

    Args:
        proto: the serialised SentencePiece model, or the path of its file.
        **kwargs: of `keras_hub.tokenizers.SentencePieceTokenizer`, except `add_bos`, `add_eos` and
            string outputs.

    Call arguments:
        inputs: a string, or a batch of strings.

    Returns:
        The token ids, a row per string.

    Raises:
        ValueError: for a `proto` that is not a whole SentencePiece model.

    Example:

    >>> tokenizer = ElitaTokenizer.from_preset("elita_wikitext2")
    >>> ids = tokenizer(["The game was", "played in 1998 ."])
    >>> tokenizer.detokenize(ids)
    ['The game was', 'played in 1998 .']
    >>> tokenizer.encode("The game was").tolist() == ids[0]
    True

    Source: Kudo and Richardson 2018, arXiv:1808.06226.
    """

    def __init__(self, proto: bytes | str | None = None, **kwargs: Any) -> None:
        for option, instead in (("add_bos", "add_start_token"), ("add_eos", "add_end_token")):
            if kwargs.get(option):
                raise ValueError(
                    f"`{option}` of ElitaTokenizer: expected False, received {kwargs[option]!r}. "
                    f"Pass {instead}=True to ElitaCausalLMPreprocessor instead."
                )
        self._add_special_token("<s>", "start_token")
        self._add_special_token("</s>", "end_token")
        self.pad_token_id = 0
        super().__init__(proto=proto, **kwargs)
        self._require_ids_as_outputs()

    def set_proto(self, proto: bytes | str | None) -> None:
        """Takes another SentencePiece model."""
        try:
            if isinstance(proto, bytes):
                _load(proto)  # before KerasHub, whose message does not say what is wrong
            super().set_proto(proto)
            self._processor = None if proto is None else _load(self.proto)
        except RuntimeError as error:
            received = f"{len(proto)} bytes" if isinstance(proto, bytes) else repr(proto)
            raise ValueError(
                f"`proto`: expected the content, or the path, of a SentencePiece `.model` file; "
                f"received {received} of something else, or cut short ({error}). Train or copy "
                "the model again."
            ) from error
        if proto is not None:
            self._choose_separator()

    def _choose_separator(self) -> None:
        """What SentencePiece would lose of a text, and the ids that stand for it."""
        processor = self._processor
        self._lossless = processor.piece_to_id("\n") != processor.unk_id()
        if self._lossless:
            pieces = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
            self._separator, self._separator_ids = SPACE_MARK, processor.piece_to_id(pieces)
            self.end_of_text = ()
        else:
            self._separator, self._separator_ids = "\n", [self.end_token_id]
            self.start_token, self.start_token_id = self.end_token, self.end_token_id
            self.end_of_text = (self.end_token_id,)

    def files(self) -> dict[str, bytes]:
        """The model as `sentencepiece.model`."""
        return {SENTENCEPIECE_FILE: self.proto}

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """The ids of every text."""
        parts = [text.split(self._separator) for text in texts]
        encoded = iter(self._processor.encode(list(itertools.chain.from_iterable(parts))))
        rows = []
        for _, *others in parts:
            row = list(next(encoded))
            for _ in others:
                row += self._separator_ids
                row += next(encoded)
            rows.append(row)
        return rows

    def decode_rows(self, rows: list[list[int]]) -> list[str]:
        """The text of every row of ids."""
        return [self._decode_row(row) for row in rows]

    def _decode_row(self, row: list[int]) -> str:
        if self._lossless:
            return self._processor.decode(row)
        lines: list[list[int]] = [[]]
        for token in row:
            lines.append([]) if token == self.end_token_id else lines[-1].append(token)
        return "\n".join(map(self._processor.decode, lines))

    def encode_in_graph(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """The ids of every text, by TensorFlow Text."""
        self._load_for_graphs()
        parts = tf.strings.split(texts, self._separator)
        tokens = self._sentence_piece.tokenize(parts.flat_values)
        is_first = tf.equal(
            tf.range(tf.size(parts.flat_values), dtype=parts.row_splits.dtype),
            tf.gather(parts.row_starts(), parts.value_rowids()),
        )
        count = len(self._separator_ids)
        num_separators = tf.reduce_sum(tf.cast(~is_first, tf.int32))
        separators = tf.RaggedTensor.from_row_lengths(
            tf.tile(tf.constant(self._separator_ids, tokens.dtype), [num_separators]),
            tf.where(is_first, tf.constant(0, tf.int64), tf.constant(count, tf.int64)),
        )
        joined = tf.concat([separators, tokens], axis=1)
        return parts.with_values(joined).merge_dims(1, 2)

    def decode_in_graph(self, rows: tf.RaggedTensor) -> tf.Tensor:
        """The text of every row of ids, by TensorFlow Text."""
        self._load_for_graphs()
        if self._lossless:
            return self._sentence_piece.detokenize(rows)
        is_end = tf.equal(rows.flat_values, self.end_token_id)
        # Every row starts a line, and so does what follows an end.
        line = tf.cumsum(tf.cast(is_end, tf.int64), exclusive=True) + rows.value_rowids()
        ends = tf.reduce_sum(tf.cast(rows.with_values(is_end), tf.int64), axis=1)
        lines = tf.RaggedTensor.from_value_rowids(
            rows.flat_values[~is_end], line[~is_end], nrows=tf.reduce_sum(ends + 1)
        )
        # TensorFlow's own separator would be missing after leading empty strings.
        texts = "\n" + self._sentence_piece.detokenize(lines)
        joined = tf.strings.reduce_join(tf.RaggedTensor.from_row_lengths(texts, ends + 1), axis=1)
        length = tf.strings.length(joined)
        return tf.strings.substr(joined, tf.ones_like(length), length - 1)

    def _set_proto_tf(self, proto: bytes) -> None:
        # Only graphs load the model into TensorFlow, which prints a line when it does.
        self._sentence_piece = None

    def _load_for_graphs(self) -> None:
        """Loads the model into TensorFlow, also again if TensorFlow has dropped it.

        TensorFlow Text's model belongs to a kernel, and `keras.utils.set_random_seed`, for one,
        clears the cache of kernels.
        """
        with tf.init_scope():
            is_loaded = self._sentence_piece is not None
            if is_loaded:
                try:
                    self._sentence_piece.tokenize([""])
                except tf.errors.NotFoundError:
                    is_loaded = False
            if not is_loaded:
                super()._set_proto_tf(self.proto)


def _load(model: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor(model_proto=model)
    if not model or processor.eos_id() < 0:
        raise RuntimeError("it has no piece for the end")
    return processor
