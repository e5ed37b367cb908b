"""A callback that saves the whole state of training, and goes on from it step for step."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from elita_tf.callbacks.checkpoint_files import Checkpoint, save_checkpoint

Logs = dict[str, Any] | None


class Resumable(Protocol):
    """A callback with a state of its own, made of what JSON knows."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on."""

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""


class Checkpoints(keras.callbacks.Callback):
    """Saves the whole state of training after steps, and puts it back into a new process.

    The state is every variable of the model (random seeds and carried states among them), of the
    optimizer and of the metrics, and the `state` of other callbacks. It is saved after the last
    step before every validation, after every step at which `seconds` have passed or `due` says
    so, and after the last step of all. Weights that are not finite are never saved.

    It is put back in the place of the loop in which it was saved. A resumed `fit` begins one step
    early, at `Checkpoint.start_step`, both in its data and in its `initial_epoch` (`start_step //
    steps_per_epoch`). The first step builds every variable and is then overwritten; the first
    epoch ends as soon as it is complete. What follows is the same, bit for bit, as if
    training had never stopped, as far as the device computes reproducibly.

    It comes after the callbacks that it saves, and `fit` needs `steps_per_epoch`.

    Args:
        folder: where to write.
        callbacks: those whose state is part of the checkpoint.
        seconds: the longest time without a checkpoint; 0 saves after every step.
        notes: further `Checkpoint.notes`.
        resumed: the checkpoint to go on from.
        due: called after every step; a true value asks for a checkpoint.

    Raises:
        ValueError: `resumed` belongs to another model or optimizer.
        FloatingPointError: a weight is not finite when a checkpoint is due.
    """

    def __init__(
        self,
        folder: Path | str,
        callbacks: Sequence[Resumable] = (),
        *,
        seconds: float = 60.0,
        notes: dict[str, Any] | None = None,
        resumed: Checkpoint | None = None,
        due: Callable[[], Any] = lambda: False,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.step = 0
        self._callbacks = callbacks
        self._seconds = seconds
        self._notes = notes or {}
        self._resumed = resumed
        self._due = due
        # A resumed epoch is shorter than `fit` knows, and so ended by `stop_training`.
        self._in_resumed_epoch = resumed is not None
        self._ends_training = False
        self._saved_at = 0.0

    def on_train_begin(self, logs: Logs = None) -> None:
        self._saved_at = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self._resumed is not None:
            self._restore(self._resumed)
            self._resumed = None
            if logs is not None:
                logs.update({k: float(v) for k, v in self.model.get_metrics_result().items()})
        else:
            self.step += 1
            late = time.perf_counter() - self._saved_at >= self._seconds
            if self._completes_epoch() or self.model.stop_training or late or self._due():
                self.save()
        if self._in_resumed_epoch and self._completes_epoch():
            self._ends_training = self.model.stop_training
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if self._in_resumed_epoch and self._completes_epoch():
            self.model.stop_training = self._ends_training
        self._in_resumed_epoch = False

    def save(self) -> None:
        """Writes a checkpoint of the state as it is now."""
        variables = self._variables()
        arrays = {name: keras.ops.convert_to_numpy(v) for name, v in variables.items()}
        for name, array in arrays.items():
            # A state carried from batch to batch may hold -inf, where nothing was read yet.
            carried = name.startswith("model") and not variables[name].trainable
            if np.isnan(array).any() if carried else not np.isfinite(array).all():
                raise FloatingPointError(
                    f"After step {self.step}, {variables[name].path} is not finite: no checkpoint "
                    "was made of it."
                )
        states = {type(callback).__name__: callback.state() for callback in self._callbacks}
        save_checkpoint(self.folder, self.step, arrays, {**self._notes, "callbacks": states})
        self._saved_at = time.perf_counter()

    def _completes_epoch(self) -> bool:
        return self.step % self.params["steps"] == 0

    def _variables(self) -> dict[str, keras.Variable]:
        groups = {
            "model": self.model.variables,
            "optimizer": self.model.optimizer.variables,
            "metric": self.model.metrics_variables,
        }
        return {f"{name}_{i}": v for name, group in groups.items() for i, v in enumerate(group)}

    def _restore(self, checkpoint: Checkpoint) -> None:
        variables, arrays = self._variables(), checkpoint.arrays
        expected = {name: tuple(variable.shape) for name, variable in variables.items()}
        received = {name: array.shape for name, array in arrays.items()}
        if expected != received:
            names = sorted({name for name, _ in expected.items() ^ received.items()})
            raise ValueError(
                f"{checkpoint.path} is of another model or optimizer: {', '.join(names)} differ in "
                "shape or are missing. Resume with what made it, or start anew."
            )
        for name, variable in variables.items():
            # NumPy's files know bfloat16 as two bytes without a meaning.
            plain = arrays[name].dtype.kind != "V"
            dtype = None if plain else keras.ops.convert_to_numpy(variable).dtype
            variable.assign(arrays[name] if plain else arrays[name].view(dtype))
        self.step = checkpoint.step
        for callback in self._callbacks:
            callback.restore(checkpoint.notes["callbacks"][type(callback).__name__])
