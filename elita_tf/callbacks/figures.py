"""Numbers of a training run: in the logs, in a file, in a plot."""

import time
from pathlib import Path
from typing import Any

import keras
from matplotlib.figure import Figure

from elita_tf.files import atomic_path

Logs = dict[str, Any] | None


class TrainingLog(keras.callbacks.Callback):
    """Adds `learning_rate` and `tokens_per_second` to the logs of steps, and `step` to epochs'.

    The callbacks after this one and the progress bar see these entries. This callback also ends the
    training after `num_steps`, even in the middle of an epoch. Training time does not include the
    first step of a run, in which the model is traced, and validations.

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
        self._began_at = time.perf_counter()

    @property
    def wall_time(self) -> float:
        """Seconds since this callback was made, plus those of the runs that it resumes."""
        return time.perf_counter() - self._began_at

    @property
    def tokens_per_second(self) -> float | None:
        """Training speed of the run so far; None before the second step."""
        return self._speed(self._timed_steps, self._seconds)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on."""
        return {
            "step": self.step,
            "timed_steps": self._timed_steps,
            "seconds": self._seconds,
            "before": self._before,
            "wall_time": self.wall_time,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        self.step, self._timed_steps = state["step"], state["timed_steps"]
        self._seconds, self._before = state["seconds"], tuple(state["before"])
        self._resumed_at = time.perf_counter()
        self._began_at = self._resumed_at - state["wall_time"]
        self._stop_at_the_end()

    def _stop_at_the_end(self) -> None:
        if self.step >= self.num_steps:
            self.model.stop_training = True

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
        self._stop_at_the_end()

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


class MetricsFile(keras.callbacks.CSVLogger):
    """`keras.callbacks.CSVLogger` whose file a resumed run continues from its checkpoint.

    The columns stay those of the first line, whatever the resumed run logs.

    Args:
        path: the file to write.
        resumed: whether to continue the file that is there.
    """

    def __init__(self, path: Path | str, resumed: bool = False) -> None:
        super().__init__(path, append=resumed)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on."""
        with Path(self.filename).open(encoding="utf-8", newline="") as file:
            return {"text": file.read()}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`: lines written after it are removed."""
        self.csv_file.truncate(0)
        self.csv_file.write(state["text"])
        self.csv_file.flush()
        self.append_header = not state["text"]
        if state["text"]:
            self.keys = state["text"].splitlines()[0].split(",")[1:]  # without the epoch


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

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on."""
        return {"points": self.points}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        self.points = {k: list(map(tuple, points)) for k, points in state["points"].items()}

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        logs = logs or {}
        for name, points in self.points.items():
            if name in logs:
                points.append((logs.get("step", epoch + 1), logs[name]))
        figure = self.figure()
        with atomic_path(self.path, single_writer=True) as temporary:
            figure.savefig(temporary, dpi=120)

    def figure(self) -> Figure:
        """The plot of the losses logged so far."""
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        labels = {"loss": "training (mean since the last point)", "val_loss": "validation"}
        for name, points in self.points.items():
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=labels[name])
        if self.reference:
            label, height = self.reference
            # Matplotlib leaves out of a legend what begins with an underscore.
            label = f" {label}" if label.startswith("_") else label
            axes.axhline(height, color="gray", linestyle="--", linewidth=1, label=label)
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        # Names may hold dollar signs, between which Matplotlib would read mathematics.
        axes.set_title(self.title, parse_math=False)
        for text in axes.legend().get_texts():
            text.set_parse_math(False)
        return figure
