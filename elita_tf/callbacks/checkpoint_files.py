"""Checkpoints as files: written whole or not at all, and known to be what was written."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

logger = logging.getLogger(__name__)

# The newest and, should it turn out damaged, the one before.
KEPT = 2
UNFINISHED = ".unfinished.npz"
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{64})\.npz")


class Checkpoint(NamedTuple):
    """A checkpoint that was read: the state after `step` optimizer steps."""

    path: Path
    step: int
    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]

    @property
    def start_step(self) -> int:
        """The step at which a resumed `fit` begins: see `Checkpoints`."""
        return self.step - 1


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path that becomes `path`: whole or not at all, and on disk.

    The temporary name is always the same, so that a killed process leaves one file at most.
    """
    temporary = path.with_name(f".{path.name}")
    try:
        write(temporary)
        _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(
    folder: Path, step: int, arrays: dict[str, np.ndarray], notes: dict[str, Any]
) -> Path:
    """Writes `step-<step>-<sha256>.npz` whole or not at all, then removes all but the last two.

    Args:
        folder: of the checkpoints; it is created.
        step: optimizer steps so far.
        arrays: what `Checkpoint.arrays` will be.
        notes: what `Checkpoint.notes` will be, made of what JSON knows.

    Returns:
        The file.

    Example:

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = save_checkpoint(folder, 7, {"kernel": np.ones((2, 3))}, {"loss": 0.5})
    >>> checkpoint = newest_checkpoint(folder)
    >>> checkpoint.step, checkpoint.arrays["kernel"].shape, checkpoint.notes
    (7, (2, 3), {'loss': 0.5})
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / UNFINISHED
    content = np.frombuffer(json.dumps(notes).encode(), "uint8")
    try:
        np.savez(temporary, notes=content, **arrays)
        path = folder / f"step-{step:08}-{_sha256(temporary)}.npz"
        _publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in _listed(folder)[:-KEPT]:
        old.unlink()
    return path


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a folder that is what its name says; None where there is none.

    A damaged one is renamed to `*.damaged`, with a warning in the log, and the one before taken.

    Raises:
        OSError: there are checkpoints, and every one is damaged.
    """
    for path in reversed(_listed(folder)):
        step, sha256 = _NAME.fullmatch(path.name).groups()
        if _sha256(path) == sha256:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            notes = json.loads(arrays.pop("notes").tobytes())
            return Checkpoint(path, int(step), arrays, notes)
        path.rename(path.with_name(f"{path.name}.damaged"))
        logger.warning(
            "The checkpoint %s is damaged: its content is not that of its name. It was renamed "
            "to *.damaged; the one before it is tried.",
            path,
        )
    damaged = sorted(folder.glob("*.damaged"))
    if damaged:
        raise OSError(
            f"Every checkpoint in {folder} is damaged: {', '.join(path.name for path in damaged)}. "
            "Restore one from a backup, under its name without .damaged, or start anew."
        )
    return None


def _listed(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.npz") if _NAME.fullmatch(path.name))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish(temporary: Path, path: Path) -> None:
    # A rename may reach the disk before the content does, unless the content is there already.
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # elsewhere, folders cannot be opened
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
