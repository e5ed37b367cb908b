"""What a run folder holds besides weights and plots, how a run goes on, and what it cost."""

import hashlib
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
import numpy as np
from recipe import Recipe, checked_recipe, load_recipe

from elita_tf.callbacks import Checkpoint, newest_checkpoint
from elita_tf.data import Tokenizer
from elita_tf.files import atomic_path

PACKAGES = ("elita_tf", "keras", "keras-hub", "tensorflow", "numpy", "sentencepiece")
RESULTS = ("summary.json", "sample.txt", "evaluation-*.json", "preset")
STATE = ("best.weights.h5", "last.weights.h5", "checkpoints", "tokenizer/*")


def is_finished(run_dir: Path, recipe: Recipe) -> bool:
    """Whether the folder holds the finished run of this recipe."""
    return _finished(run_dir) and load_recipe(str(run_dir / "recipe.toml")) == recipe


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


def notes(recipe: Recipe, train_ids: np.ndarray) -> dict[str, Any]:
    """What a checkpoint says of the run it belongs to."""
    return {"recipe": asdict(recipe), "train_ids": _fingerprint(train_ids)}


def require_same_text(checkpoint: Checkpoint, train_ids: np.ndarray) -> None:
    """Raises ValueError if the token ids are not those that the checkpoint was trained on."""
    if checkpoint.metadata["train_ids"] != _fingerprint(train_ids):
        raise ValueError(
            f"The training text or its tokens are not those that {checkpoint.path} was trained on. "
            "Begin anew with --restart, or go on with the new text with --force."
        )


def prepare(
    run_dir: Path, recipe: Recipe, tokenizer: Tokenizer, checkpoint: Checkpoint | None = None
) -> None:
    """Removes what a former run would leave beside this one's files; writes what is known.

    With a checkpoint to go on from, what goes on stays.
    """
    for pattern in RESULTS if checkpoint else RESULTS + STATE:
        for path in run_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with atomic_path(run_dir / "recipe.toml") as temporary:
        temporary.write_text(recipe.to_toml(), encoding="utf-8")
    tokenizer.save(run_dir / "tokenizer")
    if not checkpoint:
        write_json(run_dir / "versions.json", _versions())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _finished(run_dir: Path) -> bool:
    path = run_dir / "summary.json"
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["finished"]


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
