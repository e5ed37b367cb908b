"""Text corpora: three splits of UTF-8 text on disk, read line by line."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from elita_tf.data import wikitext
from elita_tf.data.cache import cache_root
from elita_tf.files import atomic_path

SPLITS = ("train", "valid", "test")
HELD_OUT_FRACTION = 0.05
# A repeated paragraph is removed if it has at least so many characters. Shorter ones are headings
# and common phrases, whose repetition tells a model nothing about the held-out text.
MIN_REPEATED_PARAGRAPH = 80


@dataclass(frozen=True)
class Split:
    """One split of a corpus: the bytes `[start, stop)` of a UTF-8 file, whole lines only.

    Only `\\n` ends a line. The lines include their ends.

    Args:
        path: the file.
        start: first byte.
        stop: the position after the last byte; None means the end of the file.

    Raises:
        ValueError: when a line is not valid UTF-8 (on reading it).
    """

    path: Path
    start: int = 0
    stop: int | None = None

    @property
    def num_bytes(self) -> int:
        """Length in bytes."""
        stop = self.path.stat().st_size if self.stop is None else self.stop
        return stop - self.start

    def byte_lines(self) -> Iterator[bytes]:
        """The lines as bytes, with their ends."""
        remaining = self.num_bytes
        with self.path.open("rb") as file:
            file.seek(self.start)
            while remaining > 0:
                line = file.readline(remaining)
                if not line:
                    raise ValueError(
                        f"{self.path} ends {remaining} bytes before the split does: it was cut "
                        "short since it was split. Load the corpus again."
                    )
                remaining -= len(line)
                yield line

    def lines(self) -> Iterator[str]:
        """The lines as text, with their ends."""
        for number, line in enumerate(self.byte_lines(), start=1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path} is not UTF-8: {error}, in line {number} of the split. "
                    "Convert the file, for example with `iconv -t utf-8`."
                ) from error

    def count_words(self) -> int:
        """The number of words between spaces, plus one for every line, as usual on WikiText."""
        return sum(len(line.split()) + 1 for line in self.byte_lines())

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the bytes."""
        digest = hashlib.sha256()
        for line in self.byte_lines():
            digest.update(line)
        return digest.hexdigest()


@dataclass(frozen=True)
class Corpus:
    """A named corpus with the splits `train`, `valid` and `test`."""

    name: str
    splits: Mapping[str, Split]

    def __getitem__(self, split: str) -> Split:
        if split not in self.splits:
            raise ValueError(f"Unknown split {split!r}: expected one of {', '.join(SPLITS)}.")
        return self.splits[split]


def load_corpus(name: str, data_dir: Path | str | None = None) -> Corpus:
    """Returns a corpus by its name, and creates or downloads its files if they are missing.

    * `pydoc`: the reference text inside every CPython (`pydoc_data.topics`; its size depends on
      the version), split 90/5/5 by topic. It needs no download.
    * `wikitext-2`, `wikitext-103`: from `data_dir` if it is given. Otherwise the files are
      downloaded once and kept in the cache.
    * `text:PATH`: a file, whose first 90 % of bytes, in whole lines, are for training, the next 5 %
      for validation and the last 5 % for the test; or a folder with `train.txt`, `valid.txt` and
      `test.txt`.

    Args:
        name: one of the names above.
        data_dir: folder with `wiki.train.raw`, `wiki.valid.raw` and `wiki.test.raw`. Only
            the WikiText corpora use it.

    Raises:
        ValueError: for an unknown name, an empty split or a download with another checksum.
        FileNotFoundError: for a missing file or folder.
        ImportError: when a download is needed and pyarrow is not installed.

    Example:

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> _ = path.write_text("a line\\n" * 100)
    >>> corpus = load_corpus(f"text:{path}")
    >>> [corpus[split].count_words() for split in ("train", "valid", "test")]
    [273, 15, 12]
    """
    if name == "pydoc":
        return Corpus(name, _pydoc_splits())
    if name in wikitext.NAMES:
        paths = wikitext.find(name, None if data_dir is None else Path(data_dir))
        return Corpus(name, {split: Split(path) for split, path in paths.items()})
    if str(name).startswith("text:"):
        return Corpus(name, _text_splits(Path(name.removeprefix("text:")).expanduser()))
    known = ", ".join(("pydoc", *wikitext.NAMES, "text:PATH"))
    raise ValueError(f"Unknown corpus {name!r}: expected one of {known}.")


def _text_splits(path: Path) -> dict[str, Split]:
    if path.is_dir():
        splits = {split: Split(path / f"{split}.txt") for split in SPLITS}
        missing = [str(split.path) for split in splits.values() if not split.path.is_file()]
        if missing:
            raise FileNotFoundError(f"Missing: {', '.join(missing)}.")
    elif path.is_file():
        splits = _split_file(path)
    else:
        raise FileNotFoundError(f"text:PATH needs an existing file or folder; received {path}.")
    empty = [name for name, split in splits.items() if split.num_bytes == 0]
    if empty:
        raise ValueError(
            f"{path} leaves no text for: {', '.join(empty)}. Give a text of more lines: a file is "
            "split between lines, and every split needs one."
        )
    return splits


def _split_file(path: Path) -> dict[str, Split]:
    size = path.stat().st_size
    test_start = _next_line_start(path, int(size * (1 - HELD_OUT_FRACTION)))
    valid_start = _next_line_start(path, int(size * (1 - 2 * HELD_OUT_FRACTION)))
    return {
        "train": Split(path, 0, valid_start),
        "valid": Split(path, valid_start, test_start),
        "test": Split(path, test_start, size),
    }


def _next_line_start(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        file.readline()
        return file.tell()


def _pydoc_splits() -> dict[str, Split]:
    texts = _divide_topics(_distinct_topics())
    digest = hashlib.sha256("\0".join(texts[split] for split in SPLITS).encode()).hexdigest()
    folder = cache_root() / "corpora" / f"pydoc-{digest[:16]}"
    splits = {split: Split(folder / f"{split}.txt") for split in SPLITS}
    for name, split in splits.items():
        content = texts[name].encode()
        if not split.path.is_file() or split.path.read_bytes() != content:
            with atomic_path(split.path) as temporary:
                temporary.write_bytes(content)
    return splits


def _distinct_topics() -> dict[str, str]:
    """The topics, without every paragraph that also appears in an earlier topic.

    About a quarter of the text appears in at least two topics. A split by topic alone would
    therefore put paragraphs of the validation and test text into the training text.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    distinct = {}
    for name in sorted(topics):
        paragraphs = topics[name].strip("\n").split("\n\n")
        distinct[name] = "\n\n".join(text for text in paragraphs if text.strip() not in seen)
        seen.update(
            text.strip() for text in paragraphs if len(text.strip()) >= MIN_REPEATED_PARAGRAPH
        )
    return distinct


def _divide_topics(topics: Mapping[str, str]) -> dict[str, str]:
    """Assigns whole topics: test and validation get their share, and training gets the rest."""
    room = {split: HELD_OUT_FRACTION * sum(map(len, topics.values())) for split in SPLITS[1:]}
    divided: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = len(topics[name])
        split = next((split for split, left in room.items() if size <= left), "train")
        if split in room:
            room[split] -= size
        divided[split].append(topics[name])
    return {split: "\n\n".join(texts) + "\n" for split, texts in divided.items()}
