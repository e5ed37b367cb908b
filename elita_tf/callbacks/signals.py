"""What Ctrl-C and SIGTERM do to a training run."""

import signal
from types import FrameType
from typing import Any

import keras

Logs = dict[str, Any] | None


class Stopped(Exception):  # noqa: N818, it is not an error
    """A signal ended the training."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(f"Stopped by {received.name}.")
        self.received = received


class StopOnSignal(keras.callbacks.Callback):
    """Ends training after the current step on Ctrl-C or SIGTERM: `fit` raises `Stopped`.

    An exception in the middle of a step could cut short a file that is being written, so only a
    second signal raises one there. `Checkpoints` saves the stopped run if it comes before this
    callback and has `due=lambda: stop.received`.

    Before the end of the first step, in validations and after training, the former handlers of the
    process are active: compiling takes long there, and there is nothing to save. Call `release`
    when an exception ends the training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._in_training = False

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        self._stop_if_received()
        if not self._before:
            self._take()

    def on_test_begin(self, logs: Logs = None) -> None:
        self._stop_if_received()
        self._in_training = bool(self._before)
        self.release()

    def on_test_end(self, logs: Logs = None) -> None:
        if self._in_training:
            self._take()

    def on_train_end(self, logs: Logs = None) -> None:
        self._stop_if_received()
        self.release()

    def release(self) -> None:
        """Restores the former handlers of the signals."""
        while self._before:
            signal.signal(*self._before.popitem())

    def _take(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)

    def _stop_if_received(self) -> None:
        if self.received:
            self.release()
            raise Stopped(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
