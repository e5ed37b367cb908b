"""The weights that a training run is for."""

import math
from pathlib import Path
from typing import Any

import keras

from elita_tf.callbacks.averages import averaged
from elita_tf.callbacks.checkpoint_files import write_whole

Logs = dict[str, Any] | None
# Bytes that HDF5 needs at most for a variable besides its numbers: the groups that it lies in.
_OVERHEAD = 4_096


class KeepWeights(keras.callbacks.Callback):
    """Writes `last.weights.h5`, and `best.weights.h5` when the validation loss is lowest.

    Both are written whole or not at all, after every epoch and, where there are none yet, at the
    start, so that a run that is killed leaves weights that load. With an optimizer that has
    `use_ema` they are the averaged weights.

    Args:
        folder: where to write.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__()
        self.last = Path(folder) / "last.weights.h5"
        self.best = Path(folder) / "best.weights.h5"
        self.best_loss = float("inf")

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on."""
        return {"best_loss": self.best_loss}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        self.best_loss = state["best_loss"] if self.best.is_file() else float("inf")

    def on_train_begin(self, logs: Logs = None) -> None:
        if not self.best_so_far.is_file():
            self.save_last()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self.save_last()
        loss = (logs or {}).get("val_loss", float("inf"))
        if loss < self.best_loss:
            self.best_loss = loss
            self._save(self.best)

    @property
    def best_so_far(self) -> Path:
        """The best weights, or the last ones as long as no validation gave a finite loss."""
        return self.best if self.best.is_file() else self.last

    def save_last(self) -> None:
        """Writes the weights as they are now."""
        self._save(self.last)

    def _save(self, path: Path) -> None:
        with averaged(self.model):
            write_whole(path, self._write)

    def _write(self, path: Path) -> None:
        # HDF5 ends the whole process where it finds no room for a file, so room is found before.
        optimizer = self.model.optimizer
        variables = [*self.model.variables, *(optimizer.variables if optimizer else [])]
        sizes = [8 if "64" in each.dtype else 4 for each in variables]
        needed = [math.prod(v.shape) * n + _OVERHEAD for v, n in zip(variables, sizes, strict=True)]
        path.write_bytes(bytes(sum(needed) + _OVERHEAD))
        self.model.save_weights(path)
