"""Tokenizers by name: trained, downloaded, loaded.

SentencePiece (Kudo and Richardson, 2018, arXiv:1808.06226; unigram model of Kudo, 2018,
arXiv:1804.10959) is trained on the training split only.
"""

import hashlib
import io
import itertools
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from elita_tf.data.cache import cache_root, cached_file
from elita_tf.data.corpora import Split
from elita_tf.data.gpt2 import download_gpt2_files, read_gpt2_files
from elita_tf.data.sentence_piece import SENTENCEPIECE_FILE, ElitaTokenizer
from elita_tf.data.tokenizer_base import Tokenizer

logger = logging.getLogger(__name__)

KINDS = ("sentencepiece", "sentencepiece-default", "gpt2")
# SentencePiece holds its training text in memory several times over.
MAX_TRAINING_BYTES = 64 << 20


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
        folder: for `gpt2`: the folder of `vocab.json` and `merges.txt`.

    Raises:
        ValueError: for an unknown kind, for a text too small for the vocabulary, and for files of
            GPT-2 that are broken.
    """
    if kind == "gpt2":
        return read_gpt2_files(download_gpt2_files() if folder is None else folder)
    if kind in KINDS:
        return train_sentencepiece(training, vocabulary_size, lossless=kind == "sentencepiece")
    raise ValueError(f"Unknown tokenizer {kind!r}: expected one of {', '.join(KINDS)}.")


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """Loads what `Tokenizer.save` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not that of a tokenizer, or cut short.
    """
    model = Path(folder) / SENTENCEPIECE_FILE
    return ElitaTokenizer(model.read_bytes()) if model.is_file() else read_gpt2_files(folder)


def train_sentencepiece(
    training: Split, vocabulary_size: int, *, lossless: bool = True
) -> ElitaTokenizer:
    """Trains a unigram model, or takes it from the cache (keyed by text and settings).

    Lossless means identity normalisation, no dummy prefix, byte fallback and the line end as a
    piece: decoding gives back the same bytes. Otherwise SentencePiece's defaults hold: NFKC, spaces
    merged and stripped, unknown characters lost, `</s>` for the line end; about 10 % fewer tokens.

    Args:
        training: the split to learn from. Of a split larger than 64 MiB only evenly spaced lines
            are used.
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

    path = cached_file(cache_root() / "tokenizers" / f"{key}.model", write)
    return ElitaTokenizer(path.read_bytes())


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
