"""The folder of a run: what it holds besides weights and plots, how a run goes on in it, its lock.

A run writes only into a folder that is absent, empty or a run's already, and deletes only what a
run wrote: the files in `manifest.json`, and checkpoints and the files of TensorBoard, which are
known by their names.
"""

import hashlib
import json
import os
import platform
import re
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import keras
import numpy as np

from elita_tf.callbacks import Checkpoint, newest_checkpoint
from elita_tf.data import Tokenizer
from elita_tf.files import atomic_path
from elita_tf.runs.recipe import Recipe, checked_recipe, load_recipe

try:
    import fcntl
except ImportError:  # Windows, where runs are not locked
    fcntl = None

PACKAGES = ("elita_tf", "keras", "keras-hub", "tensorflow", "numpy", "sentencepiece")
LOCK, MANIFEST = "run.lock", "manifest.json"
SUMMARY, SAMPLE, PRESET = "summary.json", "sample.txt", "preset"
TENSORBOARD = "tensorboard"
# What a run writes from its first step on, and what is made of a finished run.
TRAINING_FILES = (
    *("recipe.toml", "versions.json", "metrics.csv", "loss.png"),
    *("best.weights.h5", "last.weights.h5"),
)
PRESET_FILES = (
    *("preset/README.md", "preset/config.json", "preset/metadata.json", "preset/task.json"),
    *("preset/model.weights.h5", "preset/preprocessor.json", "preset/tokenizer.json"),
)
TOKENIZER_FILES = ("sentencepiece.model", "vocab.json", "merges.txt")
RESULTS = (SUMMARY, SAMPLE, f"{PRESET}/", "evaluation-")
_CHECKPOINT = re.compile(r"step-\d+-[0-9a-f]{64}\.npz(\.damaged)?|\.unfinished\.npz")


# === Is the folder a run's, and of which recipe? ===
def is_finished(run_dir: Path, recipe: Recipe) -> bool:
    """Whether the folder holds the finished run of this recipe."""
    return _finished(run_dir) and load_recipe(str(run_dir / "recipe.toml")) == recipe


def require_own(run_dir: Path, restart: bool = False) -> None:
    """Raises ValueError for a folder with files in it that no run wrote.

    Checkpoints are enough to go on with a run; to begin anew takes a manifest of what to remove.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir} is a file. Choose a folder as --run_dir.")
    found = sorted(path.name for path in run_dir.iterdir()) if run_dir.is_dir() else []
    # A process that was killed may have left an unfinished manifest, and nothing else.
    found = [name for name in found if name != LOCK and not name.endswith(f".{MANIFEST}")]
    if found and not _is_run(run_dir) and (restart or not _checkpoints(run_dir)):
        shown = ", ".join(found[:3]) + ", ..." * (len(found) > 3)
        raise ValueError(
            f"{run_dir} holds files that no run of elita_tf wrote ({shown}), and a run would "
            "change them. Choose another --run_dir."
        )


def checkpoint_of(run_dir: Path, recipe: Recipe, force: bool) -> Checkpoint | None:
    """The checkpoint that a run of this recipe goes on from; None where a run begins.

    Args:
        run_dir: it may be missing.
        recipe: of the run to come.
        force: go on with a recipe that has changed.

    Raises:
        ValueError: the folder holds a run of another recipe, or of more steps.
        OSError: every checkpoint is damaged.
    """
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None and not _finished(run_dir):
        return None
    if checkpoint:
        made_with = checked_recipe(checkpoint.metadata["recipe"])
    else:
        made_with = load_recipe(str(run_dir / "recipe.toml"))
    changed = "; ".join(made_with.differences(recipe))
    if changed and not (force and checkpoint):
        raise ValueError(
            f"{run_dir} holds a run of another recipe ({changed}). Choose another --run_dir, begin "
            "anew with --restart, or go on from its checkpoint, if it has one, with --force."
        )
    if checkpoint and checkpoint.step > recipe.steps:
        raise ValueError(
            f"{run_dir} has done {checkpoint.step} steps, more than steps = {recipe.steps}. Choose "
            "another --run_dir or more steps, or begin anew with --restart."
        )
    return checkpoint


def checkpoint_metadata(recipe: Recipe, train_ids: np.ndarray) -> dict[str, Any]:
    """What a checkpoint says of the run that it belongs to."""
    return {"recipe": asdict(recipe), "train_ids": _fingerprint(train_ids)}


def require_same_text(checkpoint: Checkpoint, train_ids: np.ndarray) -> None:
    """Raises ValueError if the token ids are not those that the checkpoint was trained on."""
    if checkpoint.metadata["train_ids"] != _fingerprint(train_ids):
        raise ValueError(
            f"The training text or its tokens are not those that {checkpoint.path} was trained on. "
            "Begin anew with --restart, or go on with the new text with --force."
        )


# === Lock ===
@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps other processes from training in the folder, which is made.

    The system frees the lock of a process that has ended, however it ended. The file names the
    process for people.

    Raises:
        ValueError: another process trains in the folder.
    """
    made = not run_dir.exists()
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK
    file = _take_lock(path)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} of {socket.gethostname()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if made:
            with suppress(OSError):  # the run has written something
                run_dir.rmdir()


def _take_lock(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        if fcntl is None:
            return file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{path.parent} is in use: {file.read() or 'another process'} trains there. Wait "
                "for its end, or choose another --run_dir."
            ) from None
        # The process that held the lock before may have removed the file in between.
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()


# === What a run writes and removes ===
def prepare(
    run_dir: Path, recipe: Recipe, tokenizer: Tokenizer, checkpoint: Checkpoint | None = None
) -> None:
    """Removes what a former run would leave beside this one's files; writes what is known.

    With a checkpoint to go on from, what goes on stays.

    Raises:
        ValueError: the folder holds what is not a run's, in the place of what this run will write.
    """
    own = _own_files(run_dir)
    is_result = {path for path in own if _name(run_dir, path).startswith(RESULTS)}
    _remove(run_dir, is_result if checkpoint else own)
    if _is_run(run_dir) or not checkpoint:
        _require_room(run_dir)
    record(run_dir, *TRAINING_FILES, *(f"tokenizer/{name}" for name in TOKENIZER_FILES))
    with atomic_path(run_dir / "recipe.toml") as temporary:
        temporary.write_text(recipe.to_toml(), encoding="utf-8")
    tokenizer.save(run_dir / "tokenizer")
    if not checkpoint:
        write_json(run_dir / "versions.json", _versions())


def record(run_dir: Path, *names: str) -> None:
    """Adds files, as paths within the folder, to the manifest; done before they are written."""
    files = sorted({*_manifest(run_dir), *names})
    write_json(run_dir / MANIFEST, {"written_by": "elita_tf", "files": files})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_summary(run_dir: Path) -> dict[str, Any]:
    """What `summary.json` holds; nothing where it is missing or not a run's."""
    return _read_json(run_dir / SUMMARY)


def _is_run(run_dir: Path) -> bool:
    return _read_json(run_dir / MANIFEST).get("written_by") == "elita_tf"


def _manifest(run_dir: Path) -> list[str]:
    files = _read_json(run_dir / MANIFEST).get("files", [])
    return [name for name in files if isinstance(name, str)]


def _finished(run_dir: Path) -> bool:
    return read_summary(run_dir).get("finished") is True


def _own_files(run_dir: Path) -> list[Path]:
    """The files within the folder that runs wrote."""
    if not _is_run(run_dir):
        return []
    paths = [run_dir / name for name in _manifest(run_dir)]
    paths += [*_checkpoints(run_dir), *(run_dir / TENSORBOARD).rglob("events.out.tfevents.*")]
    root = run_dir.resolve()  # what a manifest or a link names outside is not touched
    return [path for path in paths if path.parent.resolve().is_relative_to(root) and path.is_file()]


def _checkpoints(run_dir: Path) -> list[Path]:
    paths = (run_dir / "checkpoints").glob("*.npz*")
    return [path for path in paths if _CHECKPOINT.fullmatch(path.name)]


def _name(run_dir: Path, path: Path) -> str:
    return path.relative_to(run_dir).as_posix()


def _remove(run_dir: Path, paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink()
        for folder in path.relative_to(run_dir).parents:
            with suppress(OSError):  # it holds something else
                if folder != Path():
                    (run_dir / folder).rmdir()


def _require_room(run_dir: Path) -> None:
    own = set(_own_files(run_dir))
    written = [run_dir / name for name in (SUMMARY, SAMPLE, *PRESET_FILES)]
    foreign = [path for path in written if path.is_file() and path not in own]
    if foreign:
        raise ValueError(
            f"{foreign[0]} is not of a run of elita_tf, and this run would replace it. Move it "
            "away, or choose another --run_dir."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# === What is known of the process and the data ===
def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _fingerprint(token_ids: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(token_ids)).hexdigest()


def _versions() -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "backend": keras.backend.backend(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }
