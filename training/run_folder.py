"""What a run folder holds besides weights and plots, and what the run cost."""

import json
import os
import platform
import shutil
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import keras
from recipe import Recipe

from elita_tf.data import Tokenizer
from elita_tf.data.cache import atomic_path

PACKAGES = ("elita_tf", "keras", "keras-hub", "tensorflow", "numpy", "sentencepiece")
LEFTOVERS = (
    "best.weights.h5",
    "summary.json",
    "sample.txt",
    "evaluation-*.json",
    "tokenizer/*",
    "preset",
)


def prepare(run_dir: Path, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Removes what a former run would leave beside this one's files; writes what is known."""
    for pattern in LEFTOVERS:
        for path in run_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with atomic_path(run_dir / "recipe.toml") as temporary:
        temporary.write_text(recipe.to_toml(), encoding="utf-8")
    tokenizer.save(run_dir / "tokenizer")
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


def _versions() -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "backend": keras.backend.backend(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
    }
