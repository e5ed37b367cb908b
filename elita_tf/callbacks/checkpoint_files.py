"""Checkpoint files: written whole or not at all, and checked when they are read."""

import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elita_tf.files import file_sha256, publish, temporary_path

logger = logging.getLogger(__name__)

# The newest, and the one before in case the newest turns out to be damaged.
NUM_CHECKPOINTS = 2
UNFINISHED = ".unfinished.npz"
METADATA = "metadata"  # its name among the arrays
_NAME = re.compile(r"step-(\d+)-([0-9a-f]{64})\.npz")


class Checkpoint(NamedTuple):
    """A checkpoint that was read: the state after `step` optimizer steps."""

    path: Path
    step: int
    arrays: dict[str, np.ndarray]
    metadata: dict[str, Any]

    @property
    def start_step(self) -> int:
        """The step at which a resumed `fit` begins (see `Checkpoints`)."""
        return self.step - 1


def save_checkpoint(
    folder: Path, step: int, arrays: dict[str, np.ndarray], metadata: dict[str, Any]
) -> Path:
    """Writes `step-<step>-<sha256>.npz`, then removes all checkpoints but the last two.

    Args:
        folder: where the checkpoints are; it is created.
        step: number of optimizer steps so far.
        arrays: become `Checkpoint.arrays`.
        metadata: becomes `Checkpoint.metadata`; values that JSON can store.

    Returns:
        The file.

    Example:

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = save_checkpoint(folder, 7, {"kernel": np.ones((2, 3))}, {"loss": 0.5})
    >>> checkpoint = newest_checkpoint(folder)
    >>> checkpoint.step, checkpoint.arrays["kernel"].shape, checkpoint.metadata
    (7, (2, 3), {'loss': 0.5})
    """
    content = np.frombuffer(json.dumps(metadata).encode(), "uint8")
    with temporary_path(folder / UNFINISHED[1:], single_writer=True) as temporary:
        np.savez(temporary, **{METADATA: content}, **arrays)
        path = folder / f"step-{step:08}-{file_sha256(temporary)}.npz"
        publish(temporary, path)
    for old in _listed(folder)[:-NUM_CHECKPOINTS]:
        old.unlink()
    return path


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint of a folder; None in a folder without checkpoints.

    A checkpoint is damaged when its content does not have the checksum in its name. It is then
    renamed to `*.damaged`, with a warning in the log, and the checkpoint before it is taken.

    Raises:
        OSError: there are checkpoints, and every one is damaged.
        ValueError: the newest one was written by another version of this package.
    """
    for path in reversed(_listed(folder)):
        step, sha256 = _NAME.fullmatch(path.name).groups()
        if file_sha256(path) == sha256:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            if METADATA not in arrays:
                raise ValueError(
                    f"{path} has the format of another version of elita_tf: expected an array "
                    f"{METADATA!r} in it, found {', '.join(sorted(arrays)[:3])}, ... Go on with "
                    "the version that wrote it, or begin anew: in another folder, or with "
                    "--restart."
                )
            metadata = json.loads(arrays.pop(METADATA).tobytes())
            return Checkpoint(path, int(step), arrays, metadata)
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
