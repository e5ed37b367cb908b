"""The beginning of a run: is it a new one, or does it go on; and everything that it needs."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from elita_tf.callbacks import Checkpoint
from elita_tf.callbacks.checkpoints import require_same_model
from elita_tf.runs import devices, run_folder
from elita_tf.runs.assembly import TrainingSetup, assemble
from elita_tf.runs.recipe import Recipe


class Request(NamedTuple):
    """A run to begin, or, from its checkpoint, to go on with."""

    run_dir: Path
    recipe: Recipe
    setup: TrainingSetup
    checkpoint: Checkpoint | None
    devices: devices.Devices


class Mode(NamedTuple):
    """How a run treats what its folder holds.

    resume: only go on, and begin nothing.
    restart: begin anew, and delete what the run in the folder wrote.
    force: go on although the recipe or the text has changed.
    """

    resume: bool = False
    restart: bool = False
    force: bool = False


@contextmanager
def opened(
    recipe: Recipe, run_dir: Path, data_dir: Path | None, device_kind: str, mode: Mode
) -> Iterator[Request | None]:
    """Gives what is to be done in the folder, which is locked meanwhile; None if nothing is left.

    Raises:
        ValueError, OSError, ImportError: for what an option, a recipe or a folder can have wrong.
    """
    found = devices.find(device_kind, recipe)
    run_folder.require_own(run_dir, mode.restart)
    with found.folder(run_dir) as own, run_folder.locked(own):
        # Every process goes on from what the first one wrote.
        checkpoint = None
        if not mode.restart:
            checkpoint = run_folder.checkpoint_of(run_dir, recipe, mode.force)
            if run_folder.is_finished(run_dir, recipe):
                yield None
                return
        if checkpoint and own != run_dir:
            for weights in run_dir.glob("*.weights.h5"):
                shutil.copy(weights, own)
        if mode.resume and checkpoint is None:
            raise ValueError(f"--resume: {run_dir} holds no checkpoint to go on from.")
        with found.scope():
            setup = assemble(recipe, data_dir, checkpoint.start_step if checkpoint else 0)
            if checkpoint:
                require_same_model(checkpoint, setup.model)
        if checkpoint and not mode.force:
            run_folder.require_same_text(checkpoint, setup.train_ids)
        yield Request(own, recipe, setup, checkpoint, found)
