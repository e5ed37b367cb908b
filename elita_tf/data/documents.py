"""Documents packed into windows: the document of every token id, and windows with segment ids."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf

from elita_tf.data.cache import cache_root, cached_file
from elita_tf.data.corpora import Split
from elita_tf.data.tokenizer_base import Tokenizer
from elita_tf.data.windows import made_ahead

DOCUMENTS = ("article", "paragraph", "line")

# The title of an article in WikiText; those of its sections are ` = = Title = = ` and so on.
_TITLE = re.compile(r"\s*= [^=].* =\s*")


def document_ids(tokenizer: Tokenizer, split: Split, kind: str) -> np.ndarray:
    """For every id of `encode_split` the number of its document; memory-mapped uint32.

    * `article`: begins at a title of WikiText, a line such as " = Title = ".
    * `paragraph`: begins after blank lines, which belong to the document before.
    * `line`: every line.

    They are computed on first use, into a file of the cache. The ids that `encode_split` appends
    belong to the last document.

    Args:
        tokenizer: any `Tokenizer`.
        split: the text.
        kind: one of the kinds above.

    Raises:
        ValueError: for an unknown kind, and when the split gives no token.
        OSError: when there is no room for the file.
    """
    if kind not in DOCUMENTS:
        raise ValueError(f"Unknown kind of document {kind!r}: expected {', '.join(DOCUMENTS)}.")
    identity = f"{tokenizer.fingerprint} {split.digest()} {tokenizer.end_of_text} {kind}"
    key = hashlib.sha256(identity.encode()).hexdigest()

    def write(path: Path) -> None:
        with path.open("wb") as file:
            number = 0
            for number, document in enumerate(split_documents(split.lines(), kind)):
                length = len(tokenizer.encode_lines(document))
                file.write(np.full(length, number, np.uint32).tobytes())
            file.write(np.full(len(tokenizer.end_of_text), number, np.uint32).tobytes())

    path = cached_file(cache_root() / "token_ids" / f"{key}.documents", write)
    if path.stat().st_size == 0:
        raise ValueError(f"{split.path} gives no token: expected some text.")
    return np.memmap(path, np.uint32, mode="r")


def split_documents(lines: Iterable[str], kind: str) -> Iterator[list[str]]:
    """The documents of a text, each as its lines.

    Example:

    >>> text = [" \\n", " = A = \\n", "a\\n", " = = B = = \\n", " \\n", "b\\n", " = C = \\n"]
    >>> [len(document) for document in split_documents(text, "article")]
    [1, 5, 1]
    >>> [len(document) for document in split_documents(text, "paragraph")]
    [1, 4, 2]
    """
    document: list[str] = []
    for line in lines:
        if document and _begins(kind, line, document[-1]):
            yield document
            document = []
        document.append(line)
    if document:
        yield document


def _begins(kind: str, line: str, before: str) -> bool:
    if kind == "article":
        return _TITLE.fullmatch(line) is not None
    return kind == "line" or bool(line.strip() and not before.strip())


def pack_windows(windows: tf.data.Dataset, documents: tf.data.Dataset) -> tf.data.Dataset:
    """Adds `segment_ids` to windows, so that documents do not see each other.

    Args:
        windows: of `training_windows`, `stream_windows` or `evaluation_windows`.
        documents: windows of the `document_ids`, made with the same arguments.

    Returns:
        A dataset of `({"token_ids": x, "segment_ids": s}, y, sample_weight)`. A label that is
        not in the document of its input has weight 0. A document that goes on in the next window
        starts there from an empty state, unless the model carries its state.

    Example:

    >>> from elita_tf.data import evaluation_windows
    >>> sizes = {"context_length": 5, "batch_size": 1}
    >>> ids, documents = np.arange(6), np.array([0, 0, 0, 1, 1, 1])
    >>> datasets = [evaluation_windows(x, **sizes) for x in (ids, documents)]
    >>> inputs, labels, weights = next(iter(pack_windows(*datasets)))
    >>> inputs["segment_ids"].numpy().tolist(), weights.numpy().tolist()
    ([[0, 0, 0, 1, 1]], [[1.0, 1.0, 0.0, 1.0, 1.0]])
    """

    def pack(window: tuple, document: tuple) -> tuple:
        (inputs, labels, *weights), (numbers, next_numbers, *_) = window, document
        numbers = numbers["token_ids"]
        weight = tf.cast(numbers == next_numbers, tf.float32)
        for given in weights:
            weight *= given
        return {**inputs, "segment_ids": numbers}, labels, weight

    return made_ahead(tf.data.Dataset.zip(windows, documents).map(pack))
