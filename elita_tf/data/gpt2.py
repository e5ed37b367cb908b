"""GPT-2's byte-level BPE (Radford et al., 2019): a folder, the cache, or a pinned download."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from elita_tf.data.cache import atomic_path, cache_root, file_sha256, hub_file
from elita_tf.data.tokenizer_base import Tokenizer

REPOSITORY = "openai-community/gpt2"
REVISION = "607a30d783dfa663caf39e06633721c8d4cfcd7e"
FILES = {
    "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE through KerasHub.

    The ids are GPT-2's, with two exceptions in KerasHub 0.32: it drops the digit U+096C and the
    rest of a line after a NUL.

    Args:
        folder: folder with `vocab.json` and `merges.txt`.

    Raises:
        FileNotFoundError: when a file is missing.
        ImportError: when tensorflow-text is not installed.
        ValueError: when the files are not those of a byte-level BPE, or cut short.
    """

    def __init__(self, folder: Path | str) -> None:
        _require_tensorflow_text()
        self._files = [Path(folder) / name for name in FILES]
        missing = [str(path) for path in self._files if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"The GPT-2 tokenizer needs {', '.join(missing)}.")
        try:
            self._tokenizer = _read(*self._files)
        except ValueError as error:
            raise ValueError(
                f"{folder} does not hold the vocabulary and the merges of a byte-level BPE, or not "
                f"all of them: {error}. Copy `vocab.json` and `merges.txt` again."
            ) from error

    @property
    def vocabulary_size(self) -> int:
        """Number of entries of `vocab.json`."""
        return self._tokenizer.vocabulary_size()

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the two files' sums."""
        return hashlib.sha256("".join(map(file_sha256, self._files)).encode()).hexdigest()

    def encode_lines(self, lines: Sequence[str]) -> np.ndarray:
        """The ids (int32, rank 1) of lines, each with its line end."""
        if not lines:
            return np.zeros(0, np.int32)
        return np.fromiter(itertools.chain.from_iterable(self._tokenizer(list(lines))), np.int32)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ids, without bytes that are no UTF-8."""
        return self._tokenizer.detokenize(np.asarray(self.require_ids(token_ids), np.int32))

    def save(self, folder: Path | str) -> None:
        """Copies `vocab.json` and `merges.txt`."""
        for source in self._files:
            with atomic_path(Path(folder) / source.name) as temporary:
                shutil.copyfile(source, temporary)


def _read(vocabulary_path: Path, merges_path: Path) -> Any:
    import keras_hub

    vocabulary = json.loads(vocabulary_path.read_text(encoding="utf-8"))
    lines = merges_path.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    if not merges:
        raise ValueError("there are no merges")
    # KerasHub's Python path splits words in another way than GPT-2 does ("'s" for one), so its
    # TensorFlow path is asked for.
    return keras_hub.tokenizers.GPT2Tokenizer(vocabulary, merges, _allow_python_workflow=False)


def _require_tensorflow_text() -> None:
    if find_spec("tensorflow_text") is None:
        raise ImportError(
            "The GPT-2 tokenizer needs tensorflow-text of the installed TensorFlow's minor "
            "version: pip install tensorflow-text. SentencePiece works without it."
        )


def download() -> Path:
    """Folder of the cache with `vocab.json` and `merges.txt`, downloaded on first use.

    Raises:
        OSError, ValueError: as `hub_file`.
    """
    folder = cache_root() / "tokenizers" / "gpt2"
    instead = f"name a folder that holds {' and '.join(FILES)} (in a recipe: tokenizer_folder)"
    for name, sha256 in FILES.items():
        kept = folder / name
        if not kept.is_file() or file_sha256(kept) != sha256:
            source = hub_file(REPOSITORY, name, sha256, instead, revision=REVISION)
            with atomic_path(kept) as temporary:
                shutil.copyfile(source, temporary)
    return folder
