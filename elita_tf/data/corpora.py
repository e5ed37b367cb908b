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
# Shorter paragraphs are headings and stock phrases, which may repeat without giving text away.
MIN_REPEATED_PARAGRAPH = 80


@dataclass(frozen=True)
class Split:
    """One split of a corpus: the bytes `[start, stop)` of a UTF-8 file, whole lines only.

    A line ends with `\\n` and with nothing else; line ends are kept.

    Args:
        path: the file.
        start: first byte.
        stop: the byte after the last one; None means the end of the file.

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
        """The lines as bytes, line ends kept."""
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
        """The lines as text, line ends kept."""
        for number, line in enumerate(self.byte_lines(), start=1):
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.path} is not UTF-8: {error}, in line {number} of the split. "
                    "Convert the file, for example with `iconv -t utf-8`."
                ) from error

    def count_words(self) -> int:
        """Whitespace-separated words plus one for every line: the usual count on WikiText."""
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
    """Finds a corpus by name, making or fetching its files when needed.

    * `pydoc`: the reference text inside every CPython (`pydoc_data.topics`; its size depends on
      the version), split 90/5/5 by topic. Nothing is downloaded.
    * `wikitext-2`, `wikitext-103`: from `data_dir` when given, else from the cache, else
      downloaded once.
    * `text:PATH`: a file, split 90/5/5 at line ends in its own order, or a folder that holds
      `train.txt`, `valid.txt` and `test.txt`.

    Args:
        name: one of the names above.
        data_dir: folder with `wiki.train.raw`, `wiki.valid.raw` and `wiki.test.raw`; used by the
            WikiText corpora only.

    Raises:
        ValueError: for an unknown name, an empty split or a download that is not as pinned.
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
    """The topics without the paragraphs that an earlier topic holds already.

    About a quarter of the text stands in two topics or more, so that a split by topic alone
    would put held-out paragraphs into the training text.
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
    """Fills test, then validation, up to their share with whole topics; the rest is training."""
    room = {split: HELD_OUT_FRACTION * sum(map(len, topics.values())) for split in SPLITS[1:]}
    divided: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest()):
        size = len(topics[name])
        split = next((split for split, left in room.items() if size <= left), "train")
        if split in room:
            room[split] -= size
        divided[split].append(topics[name])
    return {split: "\n\n".join(texts) + "\n" for split, texts in divided.items()}
