"""The best and the last weights of a training run, as files."""

import math
from pathlib import Path
from typing import Any

import keras

from elita_tf.callbacks.averages import averaged
from elita_tf.files import atomic_path

Logs = dict[str, Any] | None
# Bytes that HDF5 needs at most for a variable besides its numbers: the groups that it lies in.
_OVERHEAD = 4_096


class KeepWeights(keras.callbacks.Callback):
    """Writes `last.weights.h5`, and `best.weights.h5` when the validation loss is lowest.

    Both are written whole or not at all, after every epoch. A new run also writes its initial
    weights, so that a run that is killed early leaves weights that load. With an optimizer that has
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
        """The best weights, or the last ones while no validation has given a finite loss."""
        return self.best if self.best.is_file() else self.last

    def save_last(self) -> None:
        """Writes the weights as they are now."""
        self._save(self.last)

    def _save(self, path: Path) -> None:
        with averaged(self.model), atomic_path(path, single_writer=True) as temporary:
            self._write(temporary)

    def _write(self, path: Path) -> None:
        # HDF5 ends the whole process where it finds no room for a file, so room is found before.
        optimizer = self.model.optimizer
        variables = [*self.model.variables, *(optimizer.variables if optimizer else [])]
        sizes = [8 if "64" in each.dtype else 4 for each in variables]
        needed = [math.prod(v.shape) * n + _OVERHEAD for v, n in zip(variables, sizes, strict=True)]
        path.write_bytes(bytes(sum(needed) + _OVERHEAD))
        self.model.save_weights(path)
