"""Keras callbacks of a training run: figures for the log, weights, signals, a plot of the loss."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import keras
from matplotlib.figure import Figure

Logs = dict[str, Any] | None


class TrainingLog(keras.callbacks.Callback):
    """Adds `learning_rate` and `tokens_per_second` to the logs of steps, and `step` to epochs'.

    Callbacks after this one see them, and so does the progress bar. It also ends the training
    after `num_steps`, in the middle of an epoch if need be. The first step of a run, in which
    the model is traced, and validations do not count as training time.

    Args:
        tokens_per_step: tokens in one batch.
        num_steps: optimizer steps after which to stop.
    """

    def __init__(self, tokens_per_step: int, num_steps: int) -> None:
        super().__init__()
        self.tokens_per_step = tokens_per_step
        self.num_steps = num_steps
        self.step = 0
        self._timed_steps = 0
        self._seconds = 0.0
        self._before = 0, 0.0
        self._resumed_at: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed of the run so far; None before the second step."""
        return self._speed(self._timed_steps, self._seconds)

    def _speed(self, steps: int, seconds: float) -> float | None:
        return self.tokens_per_step * steps / seconds if steps else None

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._before = self._timed_steps, self._seconds
        if self.step:
            self._resumed_at = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        now = time.perf_counter()
        self.step += 1
        if self._resumed_at is not None:
            self._seconds += now - self._resumed_at
            self._timed_steps += 1
        self._resumed_at = now
        self._add_to(logs)
        if self.step >= self.num_steps:
            self.model.stop_training = True

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._add_to(logs)
        if logs is not None:
            logs["step"] = self.step

    def _add_to(self, logs: Logs) -> None:
        if logs is None:
            return
        learning_rate = keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
        steps, seconds = self._timed_steps - self._before[0], self._seconds - self._before[1]
        logs["learning_rate"] = float(learning_rate)
        logs["tokens_per_second"] = self._speed(steps, seconds) or 0.0


class KeepWeights(keras.callbacks.Callback):
    """Writes `last.weights.h5`, and `best.weights.h5` when the validation loss is lowest.

    Both are written whole or not at all, at the start, after every epoch and at the end, so that
    a run that is killed leaves weights that load.

    Args:
        folder: where to write.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__()
        self.last = Path(folder) / "last.weights.h5"
        self.best = Path(folder) / "best.weights.h5"
        self.best_loss = float("inf")

    def on_train_begin(self, logs: Logs = None) -> None:
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
        _write_whole(path, self.model.save_weights)


class StopOnSignal(keras.callbacks.Callback):
    """Ends training after the step at hand when Ctrl-C or SIGTERM asks for it.

    Raising an exception instead could cut short whatever is being written. A second signal
    raises KeyboardInterrupt at once. The process's own handlers come back when training ends.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: signal.Signals | None = None

    def on_train_begin(self, logs: Logs = None) -> None:
        self._before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self.received:
            self.model.stop_training = True

    def on_train_end(self, logs: Logs = None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


class LossPlot(keras.callbacks.Callback):
    """Draws training and validation loss against steps after every epoch.

    Args:
        path: image file to write.
        title: title of the plot.
        reference: label and height of a horizontal line, for instance the unigram entropy.
    """

    def __init__(
        self, path: Path | str, title: str = "", reference: tuple[str, float] | None = None
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.title = title
        self.reference = reference
        self.points: dict[str, list[tuple[int, float]]] = {"loss": [], "val_loss": []}

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        logs = logs or {}
        for name, points in self.points.items():
            if name in logs:
                points.append((logs.get("step", epoch + 1), logs[name]))
        figure = self.figure()
        _write_whole(self.path, lambda path: figure.savefig(path, dpi=120))

    def figure(self) -> Figure:
        """The plot of what was logged so far."""
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        labels = {"loss": "training (mean since the last point)", "val_loss": "validation"}
        for name, points in self.points.items():
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=labels[name])
        if self.reference:
            label, height = self.reference
            axes.axhline(height, color="gray", linestyle="--", linewidth=1, label=label)
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=self.title)
        axes.grid(alpha=0.3)
        axes.legend()
        return figure


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}")
    write(temporary)
    os.replace(temporary, path)
