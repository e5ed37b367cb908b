"""The token ids of a split, computed once and read as a memory-mapped file."""

import hashlib
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from elita_tf.data.cache import cache_root, cached_file
from elita_tf.data.corpora import Split
from elita_tf.data.tokenizer_base import Tokenizer

logger = logging.getLogger(__name__)

LINES_PER_BLOCK = 2048
COUNTED_PER_BLOCK = 1 << 24


def encode_split(tokenizer: Tokenizer, split: Split) -> np.ndarray:
    """The ids of a split, rank 1, read-only, memory-mapped.

    They are encoded on first use, block by block, into a file of the cache. Its name holds the
    checksums of the tokenizer, the text and the ids. The ids are uint16 if the vocabulary is small
    enough, otherwise uint32.

    Args:
        tokenizer: any `Tokenizer`.
        split: the text.

    Raises:
        ValueError: when the split gives no token, and for a text that the tokenizer refuses.
        OSError: when there is no room for the file.
    """
    num_ids = tokenizer.vocabulary_size()
    dtype = np.uint16 if num_ids <= 1 << 16 else np.uint32
    identity = f"{tokenizer.fingerprint} {split.digest()} {tokenizer.end_of_text}"
    key = hashlib.sha256(identity.encode()).hexdigest()

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for block in _encoded_blocks(tokenizer, split):
                if block.size and not 0 <= block.min() <= block.max() < num_ids:
                    raise ValueError(
                        f"The tokenizer has no id for some text of {split.path}: it gave ids from "
                        f"{block.min()} to {block.max()}, and its vocabulary has {num_ids}. Take "
                        "the whole vocabulary."
                    )
                file.write(block.astype(dtype).tobytes())

    name = f"{key}.{np.dtype(dtype).name}"
    path = cached_file(cache_root() / "token_ids" / name, write)
    if path.stat().st_size == 0:
        raise ValueError(f"{split.path} gives no token: expected some text.")
    return np.memmap(path, dtype, mode="r")


def _encoded_blocks(tokenizer: Tokenizer, split: Split) -> Iterator[np.ndarray]:
    done = 0
    remaining = split.lines()
    while lines := list(islice(remaining, LINES_PER_BLOCK)):
        yield tokenizer.encode_lines(lines)
        done += sum(len(line.encode()) for line in lines)
        logger.info("Encoding %s: %d %%", split.path.name, 100 * done // split.num_bytes)
    yield np.asarray(tokenizer.end_of_text, np.int32)


def unigram_entropy(token_ids: np.ndarray, vocabulary_size: int) -> float:
    """Entropy of the frequencies of ids, in nats per token.

    No model that ignores the context can reach a lower loss on the same ids.

    Args:
        token_ids: ids, rank 1; may be memory-mapped.
        vocabulary_size: number of ids.

    Raises:
        ValueError: for an id beyond the vocabulary.

    Example:

    >>> round(unigram_entropy(np.array([0, 1, 0, 1]), 3), 4)
    0.6931
    """
    counts = np.zeros(vocabulary_size, np.int64)
    for start in range(0, len(token_ids), COUNTED_PER_BLOCK):
        block = token_ids[start : start + COUNTED_PER_BLOCK]
        found = np.bincount(block, minlength=vocabulary_size)
        if len(found) > vocabulary_size:
            raise ValueError(
                f"Expected ids below {vocabulary_size}, the vocabulary's size; received "
                f"{len(found) - 1}. Pass the ids and the vocabulary size of the same tokenizer."
            )
        counts += found
    frequencies = counts[counts > 0] / len(token_ids)
    return float(-np.sum(frequencies * np.log(frequencies)))
