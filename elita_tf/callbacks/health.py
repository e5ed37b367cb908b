"""What happens when a loss or gradient is not finite."""

import logging
import math
from typing import Any

import keras
from keras import ops

Logs = dict[str, Any] | None

logger = logging.getLogger(__name__)


class Health(keras.callbacks.Callback):
    """Adds `gradient_norm` to the logs, and stops when a loss or gradient is not finite.

    `gradient_norm` is the mean over the steps of an epoch. The model needs an optimizer of
    `elita_tf.optimizers`. When the optimizer skips a step, a warning goes to the log, the step
    counts as one of `skipped_steps`, and the epoch's means leave it out. An epoch in which every
    step was skipped ends the training.

    Raises:
        FloatingPointError: a loss or gradient is not finite and its step was not skipped, or every
            step of an epoch was skipped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.skipped_steps = 0
        self._norms = 0.0
        self._taken = 0
        self._metrics: list[Any] = []

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on."""
        return {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "norms": self._norms,
            "taken": self._taken,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]
        self._norms, self._taken = state["norms"], state["taken"]

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._norms, self._taken = 0.0, 0

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        if self.model.optimizer.skip_nonfinite:
            self._metrics = [ops.convert_to_numpy(v) for v in self.model.metrics_variables]

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        self.step += 1
        optimizer = self.model.optimizer
        norm = float(ops.convert_to_numpy(optimizer.gradient_norm))
        loss = float((logs or {}).get("loss", 0.0))
        if math.isfinite(norm) and math.isfinite(loss):
            self._norms += norm
            self._taken += 1
            return
        found = f"Step {self.step}: loss {loss}, norm of the gradient {norm}"
        if math.isfinite(norm) or not optimizer.skip_nonfinite:
            raise FloatingPointError(f"{found}: not finite.")
        self.skipped_steps += 1
        logger.warning("%s: left out, %d so far.", found, self.skipped_steps)
        for variable, value in zip(self.model.metrics_variables, self._metrics, strict=True):
            variable.assign(value)
        if logs is not None:
            logs.update({k: float(v) for k, v in self.model.get_metrics_result().items()})

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        if not self._taken:
            raise FloatingPointError(f"Step {self.step} ends an epoch without a finite gradient.")
        if logs is not None:
            logs["gradient_norm"] = self._norms / self._taken
            if self.model.optimizer.skip_nonfinite:
                logs["skipped_steps"] = self.skipped_steps
