"""GPT-2's byte-level BPE (Radford et al., 2019): a folder, the cache, or a pinned download."""

import json
import shutil
from pathlib import Path
from typing import Any

import keras
import keras_hub
import tensorflow as tf
from tokenizers.pre_tokenizers import ByteLevel

from elita_tf.data.cache import cache_root, hub_file
from elita_tf.data.tokenizer_base import Tokenizer
from elita_tf.files import atomic_path, file_sha256

REPOSITORY = "openai-community/gpt2"
REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
VOCABULARY_FILE, MERGES_FILE = "vocab.json", "merges.txt"
CHECKSUMS = {
    VOCABULARY_FILE: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    MERGES_FILE: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


@keras.saving.register_keras_serializable(package="elita_tf")
class ElitaGPT2Tokenizer(Tokenizer, keras_hub.models.GPT2Tokenizer):
    """GPT-2's byte-level BPE, with GPT-2's ids for every text.

    Graphs need TensorFlow Text, and there KerasHub's own splitting differs from GPT-2's for two
    characters (KerasHub 0.32): it drops the digit U+096C, and the rest of a line after a NUL.

    Args:
        vocabulary: dict from tokens to ids, or the path of a `vocab.json`.
        merges: list of merges, or the path of a `merges.txt`.
        **kwargs: of `keras_hub.models.GPT2Tokenizer`, except string outputs.

    Call arguments:
        inputs: a string, or a batch of strings.

    Returns:
        The token ids, a row per string.

    Raises:
        ValueError: for files that are not those of a byte-level BPE, and for a text with a byte
            that the vocabulary lacks.

    Example:

    >>> vocabulary = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    >>> tokenizer = ElitaGPT2Tokenizer(vocabulary, ["a b"])
    >>> tokenizer(["abb", "ba"])
    [[2, 1], [1, 0]]
    >>> tokenizer.detokenize([2, 1])
    'abb'

    Source: Radford et al. 2019 (GPT-2).
    """

    def __init__(self, vocabulary: Any = None, merges: Any = None, **kwargs: Any) -> None:
        super().__init__(vocabulary=vocabulary, merges=merges, **kwargs)
        self._require_ids_as_outputs()

    def set_vocabulary_and_merges(self, vocabulary: Any, merges: Any) -> None:
        """Takes another vocabulary and its merges, as data or as paths of files."""
        try:
            super().set_vocabulary_and_merges(vocabulary, merges)
        except Exception as error:
            # What the library `tokenizers` raises has no class of its own.
            if type(error) is Exception:
                raise ValueError(f"`vocabulary` and `merges` do not fit: {error}.") from error
            raise
        if self.vocabulary is not None:
            # KerasHub splits words as Llama 3 does; GPT-2 takes "'s", for one, apart.
            self._tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
            self._has_all_bytes = set(ByteLevel.alphabet()) <= self.vocabulary.keys()

    def files(self) -> dict[str, bytes]:
        """The vocabulary as `vocab.json` and the merges as `merges.txt`."""
        lines = ["#version: 0.2", *(merge for merge in self.merges if not _is_version(merge))]
        return {
            VOCABULARY_FILE: json.dumps(self.vocabulary, ensure_ascii=False).encode(),
            MERGES_FILE: "".join(f"{line}\n" for line in lines).encode(),
        }

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """The ids of every text."""
        if self.add_prefix_space:
            texts = [f" {text}" for text in texts]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        rows = [encoding.ids for encoding in encodings]
        # A byte without an id would be left out in silence.
        if not self._has_all_bytes and self.decode_rows(rows) != texts:
            raise ValueError(
                "The tokenizer has no id for some of the text: its vocabulary lacks single bytes. "
                "Take the whole vocabulary."
            )
        return rows

    def decode_rows(self, rows: list[list[int]]) -> list[str]:
        """The text of every row of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode_batch(rows, skip_special_tokens=False)

    def encode_in_graph(self, texts: tf.Tensor) -> tf.RaggedTensor | tf.Tensor:
        """The ids of every text, by TensorFlow Text."""
        return keras_hub.models.GPT2Tokenizer.tokenize(self, texts)

    def decode_in_graph(self, rows: tf.RaggedTensor) -> tf.Tensor:
        """The text of every row of ids; bytes that are not UTF-8 become U+FFFD."""
        texts = keras_hub.models.GPT2Tokenizer.detokenize(self, rows)
        return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8")


def read_gpt2_files(folder: Path | str) -> ElitaGPT2Tokenizer:
    """The tokenizer of a folder with `vocab.json` and `merges.txt`.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when the files are not those of a byte-level BPE, or cut short.
    """
    vocabulary_path, merges_path = (Path(folder) / name for name in CHECKSUMS)
    missing = [str(path) for path in (vocabulary_path, merges_path) if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"The GPT-2 tokenizer needs {', '.join(missing)}.")
    try:
        vocabulary = json.loads(vocabulary_path.read_text(encoding="utf-8"))
        lines = merges_path.read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not _is_version(line)]
        if not merges:
            raise ValueError("there are no merges")
        return ElitaGPT2Tokenizer(vocabulary, merges)
    except ValueError as error:
        raise ValueError(
            f"{folder} does not hold the vocabulary and the merges of a byte-level BPE, or not "
            f"all of them: {error}. Copy `{VOCABULARY_FILE}` and `{MERGES_FILE}` again."
        ) from error


def _is_version(line: str) -> bool:
    return line.startswith("#version")


def download_gpt2_files() -> Path:
    """Folder of the cache with `vocab.json` and `merges.txt`, downloaded on first use.

    Raises:
        OSError, ValueError: as `hub_file`.
    """
    folder = cache_root() / "tokenizers" / "gpt2"
    instead = f"name a folder that holds {' and '.join(CHECKSUMS)} (in a recipe: tokenizer_folder)"
    for name, sha256 in CHECKSUMS.items():
        path = folder / name
        if not path.is_file() or file_sha256(path) != sha256:
            source = hub_file(REPOSITORY, name, sha256, instead, revision=REVISION)
            with atomic_path(path) as temporary:
                shutil.copyfile(source, temporary)
    return folder
