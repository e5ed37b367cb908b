"""Averages of the weights, for validation and for what is written."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

Logs = dict[str, Any] | None


class ValidateAverages(keras.callbacks.Callback):
    """Validates with the averaged weights of an optimizer with `use_ema`.

    Training goes on from the weights as they were. `keras.callbacks.SwapEMAWeights` does the same,
    but on TensorFlow it exchanges weights by adding and subtracting them, which rounds: a resumed
    run would end with other weights than one that was never interrupted.

    Place it last: callbacks before it that raise at the beginning of a validation then find the
    weights of the training.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exchanged = False

    def on_test_begin(self, logs: Logs = None) -> None:
        self._exchange(True)

    def on_test_end(self, logs: Logs = None) -> None:
        self._exchange(False)

    def _exchange(self, wanted: bool) -> None:
        if self._exchanged != wanted:
            exchange_averages(self.model)
            self._exchanged = wanted


@contextmanager
def averaged(model: keras.Model) -> Iterator[None]:
    """Within it, the model has the averaged weights of its optimizer, if that has some."""
    exchange_averages(model)
    try:
        yield
    finally:
        exchange_averages(model)


def exchange_averages(model: keras.Model) -> None:
    """Exchanges the weights and their averages, bit for bit; nothing where there are none yet."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # of mixed_float16
    averages = getattr(optimizer, "_model_variables_moving_average", [])
    if not averages or not int(ops.convert_to_numpy(optimizer.iterations)):
        return
    for variable, average in zip(optimizer._trainable_variables, averages, strict=True):
        weights = ops.convert_to_numpy(variable)
        variable.assign(ops.convert_to_numpy(average))
        average.assign(weights)
