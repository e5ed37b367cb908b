"""WikiText-2 and WikiText-103 (raw): a local folder, the cache, or a pinned download.

Source: Merity et al., "Pointer Sentinel Mixture Models", 2016, arXiv:1609.07843; CC BY-SA 3.0.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from elita_tf.data.cache import cache_root, hub_file
from elita_tf.files import atomic_path

logger = logging.getLogger(__name__)

NAMES = ("wikitext-2", "wikitext-103")
REPOSITORY = "Salesforce/wikitext"
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"


class Parquet(NamedTuple):
    """A file of the pinned revision."""

    path: str
    sha256: str


VALID = Parquet(
    "wikitext-2-raw-v1/validation-00000-of-00001.parquet",
    "204929b7ff9d6184953f867dedb860e40aa69c078fc1e54b3baaa8fb28511c4c",
)
TEST = Parquet(
    "wikitext-2-raw-v1/test-00000-of-00001.parquet",
    "5f1bea067869d04849c0f975a2b29c4ff47d867f484f5010ea5e861eab246d91",
)
# WikiText-103 has the validation and test text of WikiText-2.
PARQUETS: dict[str, dict[str, tuple[Parquet, ...]]] = {
    "wikitext-2": {
        "train": (
            Parquet(
                "wikitext-2-raw-v1/train-00000-of-00001.parquet",
                "e83889baabc497075506f91975be5fac0d45c5290b6b20582c8cd1e853d0c9f7",
            ),
        ),
        "valid": (VALID,),
        "test": (TEST,),
    },
    "wikitext-103": {
        "train": (
            Parquet(
                "wikitext-103-raw-v1/train-00000-of-00002.parquet",
                "74da360f23826045b3e6ac6375411fdb15f003030aa74f2596ed08b857cb9212",
            ),
            Parquet(
                "wikitext-103-raw-v1/train-00001-of-00002.parquet",
                "ba090ac30dbf5461e8dcbdd1a1b8e6f3cf9c2c756d64f0c1220450acd514f720",
            ),
        ),
        "valid": (VALID,),
        "test": (TEST,),
    },
}
NUM_BYTES: dict[str, dict[str, int]] = {
    "wikitext-2": {"train": 10_940_747, "valid": 1_146_846, "test": 1_290_590},
    "wikitext-103": {"valid": 1_146_846, "test": 1_290_590},
}


def find(name: str, data_dir: Path | None = None) -> dict[str, Path]:
    """Paths of the three raw files of `name`, which are downloaded if the cache lacks them.

    Args:
        name: one of `NAMES`.
        data_dir: folder with `wiki.train.raw`, `wiki.valid.raw` and `wiki.test.raw`. If it is
            given, neither the cache nor the network is used.

    Raises:
        FileNotFoundError: when `data_dir` lacks a file.
        ImportError: when a download is needed and pyarrow is not installed.
        ValueError: when a downloaded file has another checksum or size than expected.
    """
    folder = data_dir or cache_root() / "corpora" / name
    paths = {split: folder / f"wiki.{split}.raw" for split in PARQUETS[name]}
    if data_dir is None:
        for split, path in paths.items():
            size = path.stat().st_size if path.is_file() else None
            if size is None or size != NUM_BYTES[name].get(split, size):
                _download(name, split, path)
        return paths
    missing = [path.name for path in paths.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{data_dir} lacks {', '.join(missing)}, which {name} needs.")
    for split, expected in NUM_BYTES[name].items():
        size = paths[split].stat().st_size
        if size != expected:
            logger.warning("%s has %d bytes; %s has %d.", paths[split], size, name, expected)
    return paths


def _download(name: str, split: str, path: Path) -> None:
    parquets = [_fetch(parquet) for parquet in PARQUETS[name][split]]
    logger.info("Writing %s", path)
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            file.writelines(line for parquet in parquets for line in _raw_lines(parquet))
        expected = NUM_BYTES[name].get(split)
        size = temporary.stat().st_size
        if expected is not None and size != expected:
            raise ValueError(
                f"{name} {split} has {size} bytes after the download, expected {expected}: the "
                "layout of the downloaded files has changed. Pass the raw files with data_dir."
            )


def _fetch(parquet: Parquet) -> Path:
    _require_pyarrow()
    logger.info("Downloading %s of %s", parquet.path, REPOSITORY)
    return hub_file(
        REPOSITORY,
        parquet.path,
        parquet.sha256,
        "pass the raw files with data_dir",
        revision=REVISION,
        repo_type="dataset",
    )


def _require_pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Downloading WikiText needs pyarrow: pip install 'elita_tf[wikitext]'. "
            "Or pass a folder with wiki.train.raw, wiki.valid.raw and wiki.test.raw as data_dir."
        ) from error


def _raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of the raw file; an empty row stands for the blank line `" \\n"`."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(columns=["text"]):
            for row in batch.column(0):
                yield (row.as_py() or " \n").encode()
