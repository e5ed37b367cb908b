"""What happens when a loss or gradient is not finite."""

import logging
import math
from typing import Any

import keras
from keras import ops

Logs = dict[str, Any] | None

logger = logging.getLogger(__name__)


class Health(keras.callbacks.Callback):
    """Adds figures to the logs of epochs, and stops when a loss or gradient is not finite.

    `gradient_norm` is the mean over the steps of an epoch, `skipped_steps` the sum so far. The
    model needs an optimizer of `elita_tf.optimizers`. When the optimizer skips a step, a warning
    goes to the log, and the epoch's means leave the step out. An epoch in which every step was
    skipped ends the training.

    Under `mixed_float16` Keras scales the loss, and skips steps whose scaled gradient overflows, to
    go on with half the scale. These count as skipped too, and need no `skip_nonfinite`; a loss that
    is not finite does.

    Raises:
        FloatingPointError: a loss or gradient is not finite and its step was not skipped, or every
            step of an epoch was skipped.
        ValueError: the optimizer is none of `elita_tf.optimizers`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.skipped_steps = 0
        self._norms = 0.0
        self._taken = 0
        self._metrics: list[Any] = []
        self._scale = 1.0

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

    def on_train_begin(self, logs: Logs = None) -> None:
        if not hasattr(self._monitored, "skip_nonfinite"):
            raise ValueError(
                "Health reads the norm of the gradient from an optimizer of elita_tf.optimizers, "
                f"such as MonitoredAdam; the model is compiled with {self.model.optimizer!r}."
            )

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        if self._skips:
            self._metrics = [ops.convert_to_numpy(v) for v in self.model.metrics_variables]
            self._scale = self._loss_scale()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        self.step += 1
        loss = float((logs or {}).get("loss", 0.0))
        # Where the gradient of the scaled loss overflows, the optimizer below is not asked.
        overflow = self._loss_scale() < self._scale
        norm = float("inf")
        if not overflow:
            norm = float(ops.convert_to_numpy(self._monitored.gradient_norm))
        if math.isfinite(norm) and math.isfinite(loss):
            self._norms += norm
            self._taken += 1
            return
        found = f"Step {self.step}: loss {loss}, norm of the gradient {norm}"
        skipped = self._monitored.skip_nonfinite or (overflow and math.isfinite(loss))
        if math.isfinite(norm) or not skipped:
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
            logs["skipped_steps"] = self.skipped_steps

    @property
    def _monitored(self) -> Any:
        """The optimizer that knows the norm; under `mixed_float16`, Keras wraps it."""
        return getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)

    @property
    def _skips(self) -> bool:
        return self._monitored.skip_nonfinite or self.model.optimizer is not self._monitored

    def _loss_scale(self) -> float:
        """The factor that `mixed_float16` trains the loss with; 1 where there is none."""
        optimizer = self.model.optimizer
        if optimizer is self._monitored:
            return 1.0
        if not optimizer.built:
            return optimizer.initial_scale
        return float(ops.convert_to_numpy(optimizer.dynamic_scale))
