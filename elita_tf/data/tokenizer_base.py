"""What all tokenizers share: one class encodes corpora, and is a KerasHub layer for models."""

import hashlib
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from elita_tf.files import atomic_path


class Tokenizer:
    """Mixin of a KerasHub tokenizer: every form of texts and ids, in Python and in graphs.

    A tokenizer inherits from this class and then from a tokenizer of KerasHub, whose constructor,
    special tokens, assets and presets it keeps. It defines `encode_texts`, `decode_rows` and
    `files`, and for graphs `encode_in_graph` and `decode_in_graph`. Corpora need only
    `encode_texts`, `files` and `vocabulary_size` (see `encode_split`).
    """

    #: ids that are added once at the end of a split
    end_of_text: tuple[int, ...] = ()
    #: length of the rows that `tokenize` returns, padded or cut; None leaves them as they are
    sequence_length: int | None = None

    def vocabulary_size(self) -> int:
        """Number of ids."""
        return super().vocabulary_size()

    def files(self) -> dict[str, bytes]:
        """The content of the files that `load_tokenizer` reads, by name."""
        raise NotImplementedError

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """The ids of every text."""
        raise NotImplementedError

    def decode_rows(self, rows: list[list[int]]) -> list[str]:
        """The text of every row of ids; bytes that are not UTF-8 become U+FFFD."""
        raise NotImplementedError

    def encode_in_graph(self, texts: tf.Tensor) -> tf.RaggedTensor | tf.Tensor:
        """`encode_texts` of a string tensor of rank 1, in a TensorFlow graph."""
        raise NotImplementedError

    def decode_in_graph(self, rows: tf.RaggedTensor) -> tf.Tensor:
        """`decode_rows` of a ragged tensor of ids, in a TensorFlow graph."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of `files`."""
        sums = [hashlib.sha256(content).hexdigest() for content in self.files().values()]
        return hashlib.sha256("".join(sums).encode()).hexdigest()

    def save(self, folder: Path | str) -> None:
        """Writes `files`, which `load_tokenizer` reads."""
        for name, content in self.files().items():
            with atomic_path(Path(folder) / name) as temporary:
                temporary.write_bytes(content)

    def encode_lines(self, lines: Sequence[str]) -> np.ndarray:
        """The ids (int32, rank 1) of lines, each with its line end, one line after the other."""
        return np.fromiter(itertools.chain.from_iterable(self.encode_texts(list(lines))), np.int32)

    def encode(self, text: str) -> np.ndarray:
        """The ids (int32, rank 1) of a text as it is encoded in a corpus, line by line.

        Raises:
            ValueError: for anything but a string, and for a string that holds half a character (a
                lone surrogate).
        """
        return self.encode_lines(list(io.StringIO(_checked(text), newline="\n")))

    def tokenize(self, inputs: Any) -> Any:
        """The ids of a string, or of every string of a batch.

        Args:
            inputs: a string, bytes in UTF-8, or a list, array or tensor of rank 1 of these.

        Returns:
            A list of ids, or a list of such lists; an array with `sequence_length`. In a graph a
            tensor, or a ragged tensor.

        Raises:
            ValueError: for anything but texts.
        """
        self._check_vocabulary()
        if not tf.executing_eagerly():
            return self._tokenize_in_graph(inputs)
        texts, is_batch = texts_of(inputs)
        rows = self.encode_texts(texts)
        if self.sequence_length:
            padding = [self.pad_token_id] * self.sequence_length
            padded = [(row + padding)[: self.sequence_length] for row in rows]
            rows = np.reshape(np.array(padded, self.compute_dtype), (-1, self.sequence_length))
        return rows if is_batch else rows[0]

    def detokenize(self, inputs: Any) -> Any:
        """The text of ids, or of every row of ids; bytes that are not UTF-8 become U+FFFD.

        Args:
            inputs: ids of rank 1 or 2: a list, an array, a tensor or a ragged tensor.

        Raises:
            ValueError: outside a graph, for an id that the vocabulary lacks, and for anything but
                integers.
        """
        self._check_vocabulary()
        if not tf.executing_eagerly():
            return self._detokenize_in_graph(inputs)
        rows, is_batch = _id_rows(inputs)
        size = self.vocabulary_size()
        unknown = [token for row in rows for token in row if not 0 <= token < size]
        if unknown:
            raise ValueError(
                f"Expected ids from 0 to {size - 1}; received {unknown[:5]}. They come from "
                "another tokenizer, or from a model with a larger vocabulary."
            )
        texts = self.decode_rows(rows)
        return texts if is_batch else texts[0]

    def _tokenize_in_graph(self, inputs: Any) -> tf.Tensor | tf.RaggedTensor:
        texts = tf.convert_to_tensor(inputs)
        if texts.dtype != tf.string or texts.shape.rank not in (0, 1):
            raise ValueError(
                f"Expected strings of rank 0 or 1; received {texts.dtype.name} of shape "
                f"{texts.shape}. Token ids need no tokenizer: a model without a preprocessor "
                "takes them."
            )
        rows = self.encode_in_graph(tf.reshape(texts, [-1]))
        if self.sequence_length and isinstance(rows, tf.RaggedTensor):
            rows = rows.to_tensor(self.pad_token_id, shape=[None, self.sequence_length])
        return rows if texts.shape.rank else rows[0]

    def _detokenize_in_graph(self, inputs: Any) -> tf.Tensor:
        if not isinstance(inputs, tf.RaggedTensor):
            inputs = tf.convert_to_tensor(inputs)
        if inputs.shape.rank not in (1, 2):
            raise ValueError(f"Expected ids of rank 1 or 2; received shape {inputs.shape}.")
        is_batch = inputs.shape.rank == 2
        rows = inputs if is_batch else inputs[None]
        if not isinstance(rows, tf.RaggedTensor):
            rows = tf.RaggedTensor.from_tensor(rows)
        texts = self.decode_in_graph(tf.cast(rows, tf.int32))
        return texts if is_batch else texts[0]

    def _require_ids_as_outputs(self) -> None:
        if self.compute_dtype == "string":
            raise ValueError(
                f"`dtype` of {type(self).__name__}: expected an integer type, received 'string'. "
                "For the pieces of a text as strings, call `id_to_token` on its ids."
            )


def texts_of(inputs: Any) -> tuple[list[str], bool]:
    """The texts of what `tokenize` takes, and whether it was more than a single one.

    Raises:
        ValueError: for anything but texts, such as None or NaN among them.
    """
    if not isinstance(inputs, str | bytes) and hasattr(inputs, "__array__"):
        inputs = np.asarray(inputs, dtype=object).tolist()
    is_batch = isinstance(inputs, list | tuple)
    return [_checked(text) for text in (inputs if is_batch else [inputs])], is_batch


def _checked(text: Any) -> str:
    """The text as a string, or a ValueError that says why it is not a text."""
    try:
        if isinstance(text, bytes):
            return text.decode()
        if isinstance(text, str):
            text.encode()
            return text
    except UnicodeError as error:
        raise ValueError(
            f"A text is not Unicode: {error}. Read it with its right encoding, or replace the "
            'character: text.encode(errors="replace").decode().'
        ) from error
    raise ValueError(
        "Expected a string, or a batch of strings of rank 1; received the element "
        f"{text!r:.60} of type {type(text).__name__}. Token ids need no tokenizer: a model without "
        "a preprocessor takes them."
    )


def _id_rows(inputs: Any) -> tuple[list[list[int]], bool]:
    """The rows of ids, and whether there was more than a single row without a batch axis."""
    if isinstance(inputs, tf.RaggedTensor):
        inputs = inputs.to_list()
    is_ragged = isinstance(inputs, list | tuple) and any(np.ndim(row) for row in inputs)
    arrays = [np.asarray(row) for row in inputs] if is_ragged else [np.asarray(inputs)]
    for array in arrays:
        if array.ndim > (1 if is_ragged else 2) or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(
                f"Expected token ids of rank 1 or 2; received {array.dtype} of shape "
                f"{array.shape}{' in a list' if is_ragged else ''}."
            )
    is_batch = is_ragged or arrays[0].ndim == 2
    if arrays[0].ndim == 2:
        arrays = list(arrays[0])
    return [np.ravel(array).tolist() for array in arrays], is_batch
