"""Tokenizers behind one small interface: trained, cached, loaded, run.

SentencePiece (Kudo and Richardson, 2018, arXiv:1808.06226; unigram model of Kudo, 2018,
arXiv:1804.10959) is trained on the training split only.
"""

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from elita_tf.data import gpt2
from elita_tf.data.cache import atomic_path, cache_root, kept_file
from elita_tf.data.corpora import Split
from elita_tf.data.gpt2 import GPT2Tokenizer
from elita_tf.data.tokenizer_base import Tokenizer

logger = logging.getLogger(__name__)

KINDS = ("sentencepiece", "sentencepiece-default", "gpt2")
# SentencePiece holds its training text in memory several times over.
MAX_TRAINING_BYTES = 64 << 20
SENTENCEPIECE_FILE = "sentencepiece.model"
# SentencePiece writes a space as this character, so that the character itself needs its bytes.
SPACE_MARK = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, given as its serialised bytes.

    A model with the piece `"\\n"` is lossless (see `train_sentencepiece`). Any other one reads
    line by line, and `</s>` stands for the line end: one token for every line of
    `text.split("\\n")`, so that one more ends a split.

    Args:
        model: content of a `.model` file.

    Raises:
        ValueError: for anything else, and for a file that was cut short.
    """

    def __init__(self, model: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model = model
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
            if not model or self._processor.eos_id() < 0:
                raise RuntimeError("it has no piece for the end")
        except RuntimeError as error:
            raise ValueError(
                f"Expected the content of a SentencePiece `.model` file, received {len(model)} "
                f"bytes of something else, or cut short ({error}). Train or copy the model again."
            ) from error
        self._lossless = self._processor.piece_to_id("\n") != self._processor.unk_id()
        self._mark_ids: list[int] = []
        if self._lossless:
            pieces = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
            self._mark_ids = self._processor.piece_to_id(pieces)
        else:
            self.end_of_text = (self._processor.eos_id(),)

    @property
    def vocabulary_size(self) -> int:
        """Number of pieces."""
        return self._processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the model."""
        return hashlib.sha256(self._model).hexdigest()

    def encode_lines(self, lines: Sequence[str]) -> np.ndarray:
        """The ids (int32, rank 1) of lines, each with its line end."""
        if self._lossless:
            encoded = [
                self._encode_with_marks(line) if SPACE_MARK in line else ids
                for line, ids in zip(lines, self._processor.encode(list(lines)), strict=True)
            ]
        else:
            encoded = self._processor.encode([line.removesuffix("\n") for line in lines])
            for line, ids in zip(lines, encoded, strict=True):
                ids.extend(self.end_of_text if line.endswith("\n") else ())
        return np.fromiter(itertools.chain.from_iterable(encoded), np.int32)

    def _encode_with_marks(self, line: str) -> list[int]:
        first, *rest = self._processor.encode(line.split(SPACE_MARK))
        return first + [token for ids in rest for token in self._mark_ids + ids]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of ids; without the piece `"\\n"`, every `</s>` is a line end."""
        ids = self.require_ids(token_ids)
        if self._lossless:
            return self._processor.decode(ids)
        (line_end,) = self.end_of_text
        lines: list[list[int]] = [[]]
        for token in ids:
            lines.append([]) if token == line_end else lines[-1].append(token)
        return "\n".join(self._processor.decode(lines))

    def save(self, folder: Path | str) -> None:
        """Writes `sentencepiece.model`."""
        with atomic_path(Path(folder) / SENTENCEPIECE_FILE) as temporary:
            temporary.write_bytes(self._model)


def make_tokenizer(
    kind: str, training: Split, *, vocabulary_size: int = 2048, folder: Path | str | None = None
) -> Tokenizer:
    """The tokenizer of a kind.

    * `sentencepiece`: trained on `training`, lossless.
    * `sentencepiece-default`: the same with SentencePiece's own defaults (see
      `train_sentencepiece`).
    * `gpt2`: GPT-2's, from `folder` or downloaded once.

    Args:
        kind: one of the above.
        training: the training split.
        vocabulary_size: number of pieces of a SentencePiece model; not used by `gpt2`.
        folder: where `vocab.json` and `merges.txt` lie, for `gpt2`.

    Raises:
        ValueError: for an unknown kind, or a vocabulary that the text is too small for.
    """
    if kind == "gpt2":
        return GPT2Tokenizer(gpt2.download() if folder is None else folder)
    if kind in KINDS:
        return train_sentencepiece(training, vocabulary_size, lossless=kind == "sentencepiece")
    raise ValueError(f"Unknown tokenizer {kind!r}: expected one of {', '.join(KINDS)}.")


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Loads what `Tokenizer.save` wrote."""
    model = Path(folder) / SENTENCEPIECE_FILE
    return SentencePieceTokenizer(model.read_bytes()) if model.is_file() else GPT2Tokenizer(folder)


def train_sentencepiece(
    training: Split, vocabulary_size: int, *, lossless: bool = True
) -> SentencePieceTokenizer:
    """Trains a unigram model, or takes it from the cache (keyed by text and settings).

    Lossless: identity normalisation, no dummy prefix, byte fallback, the line end as a piece;
    decoding gives back the very bytes. Otherwise SentencePiece's defaults: NFKC, spaces merged
    and stripped, unknown characters lost, `</s>` for the line end; about 10 % fewer tokens.

    Args:
        training: the split to learn from; of more than 64 MiB, evenly spaced lines.
        vocabulary_size: number of pieces.
        lossless: see above.

    Raises:
        ValueError: when SentencePiece refuses, for instance a vocabulary too large for the text.
    """
    import sentencepiece

    if isinstance(vocabulary_size, bool) or not isinstance(vocabulary_size, int):
        raise ValueError(
            f"`vocabulary_size` counts pieces: expected an integer, received {vocabulary_size!r}."
        )
    settings: dict[str, object] = {"model_type": "unigram", "vocab_size": vocabulary_size}
    if lossless:
        settings |= {
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "user_defined_symbols": ["\n"],
        }
    identity = [training.digest(), settings, MAX_TRAINING_BYTES, sentencepiece.__version__]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def write(path: Path) -> None:
        logger.info("Training a SentencePiece model of %d pieces", vocabulary_size)
        path.write_bytes(_run_trainer(training, settings, keep_line_ends=lossless))

    path = kept_file(cache_root() / "tokenizers" / f"{key}.model", write)
    return SentencePieceTokenizer(path.read_bytes())


def _run_trainer(training: Split, settings: Mapping[str, object], *, keep_line_ends: bool) -> bytes:
    from sentencepiece import SentencePieceTrainer

    stride = max(1, -(-training.num_bytes // MAX_TRAINING_BYTES))
    lines = itertools.islice(training.lines(), None, None, stride)
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines if keep_line_ends else (s.removesuffix("\n") for s in lines),
            model_writer=model,
            max_sentence_length=MAX_TRAINING_BYTES,
            minloglevel=2,
            **settings,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece could not learn {settings['vocab_size']} pieces from {training.path}: "
            f"{error}. Change vocabulary_size, give more text, or break up lines of millions of "
            f"characters; those of more than {MAX_TRAINING_BYTES} bytes are left out."
        ) from error
    return model.getvalue()
