import os
import signal

import keras
import numpy as np
import pytest

from elita_tf.callbacks import (
    KeepWeights,
    LossPlot,
    StopOnSignal,
    Stopped,
    TrainingLog,
    ValidateAverages,
    figures,
)


class Clock:
    """A clock that every step of the model moves on by a second."""

    now = 0.0

    def __call__(self):
        return self.now


class Tick(keras.callbacks.Callback):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_train_batch_begin(self, batch, logs=None):
        self.clock.now += 1.0

    def on_test_begin(self, logs=None):
        self.clock.now += 100.0


class Record(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.steps, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(dict(logs))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(dict(logs))


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.125), "mse")
    return model


def fit(model, *extra, epochs=3, validation=True):
    data = np.ones((8, 2)), np.ones((8, 1))
    return model.fit(
        *data,
        batch_size=2,
        epochs=epochs,
        validation_data=data if validation else None,
        callbacks=list(extra),
        verbose=0,
    )


def test_training_log_counts_steps_speed_and_stops(model, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(figures.time, "perf_counter", clock)
    log, record = TrainingLog(tokens_per_step=30, num_steps=10), Record()
    fit(model, Tick(clock), log, record, epochs=5)
    assert log.step == len(record.steps) == 10
    assert [logs["step"] for logs in record.epochs] == [4, 8, 10]
    assert record.steps[0]["tokens_per_second"] == 0
    assert all(logs["tokens_per_second"] == 30 for logs in record.steps[1:])
    assert log.tokens_per_second == 30
    assert record.epochs[0]["learning_rate"] == 0.125


def test_no_speed_before_the_second_step():
    assert TrainingLog(30, 10).tokens_per_second is None


def test_keep_weights_keeps_the_best_and_the_last(model, tmp_path):
    keep = KeepWeights(tmp_path)
    keep.set_model(model)
    kernels = []
    keep.on_train_begin()
    assert keep.last.is_file()
    assert not keep.best.exists()
    for epoch, loss in enumerate([3.0, 1.0, 2.0]):
        model.set_weights([np.full((2, 1), float(epoch)), np.zeros(1)])
        kernels.append(model.get_weights()[0])
        keep.on_epoch_end(epoch, {"val_loss": loss})
    assert keep.best_loss == 1.0
    for path, kernel in ((keep.best, kernels[1]), (keep.last, kernels[2])):
        model.load_weights(path)
        np.testing.assert_array_equal(model.get_weights()[0], kernel)
    assert {path.name for path in tmp_path.iterdir()} == {"best.weights.h5", "last.weights.h5"}


def test_without_validation_there_is_no_best(model, tmp_path):
    keep = KeepWeights(tmp_path)
    fit(model, keep, validation=False)
    assert keep.last.is_file()
    assert not keep.best.exists()


def test_loss_plot_draws_both_curves_against_steps(model, tmp_path):
    plot = LossPlot(tmp_path / "loss.png", "a run", reference=("entropy", 0.5))
    fit(model, TrainingLog(1, 100), plot)
    assert [step for step, _ in plot.points["loss"]] == [4, 8, 12]
    assert [step for step, _ in plot.points["val_loss"]] == [4, 8, 12]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]
    figure = plot.figure()
    (axes,) = figure.axes
    assert axes.get_ylabel() == "loss (nats per token)"
    assert axes.get_xlabel() == "optimizer step"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["training (mean since the last point)", "validation", "entropy"]
    np.testing.assert_array_equal(axes.lines[1].get_xydata(), plot.points["val_loss"])


@pytest.mark.parametrize("name", ["cost_$5_vs_$6_", "_$x_", "a\\b $\\frac$", "100 % {of} ^it"])
def test_names_in_plots_are_no_mathematics(tmp_path, name):
    plot = LossPlot(tmp_path / "loss.png", name, reference=(name, 0.5))
    plot.on_epoch_end(0, {"loss": 1.0})
    (axes,) = plot.figure().axes
    assert axes.get_title() == name
    assert axes.get_legend().get_texts()[-1].get_text().strip() == name


class Weights(keras.callbacks.Callback):
    """The kernel after every step, in validation, and after it."""

    def __init__(self):
        super().__init__()
        self.steps, self.tested, self.after = [], [], []

    def kernel(self):
        return self.model.get_weights()[0].copy()

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(self.kernel())

    def on_test_batch_end(self, batch, logs=None):
        self.tested.append(self.kernel())

    def on_epoch_end(self, epoch, logs=None):
        self.after.append(self.kernel())


def test_validation_and_files_are_of_the_averages_and_training_is_not(model, tmp_path):
    start = model.get_weights()
    plain, seen, keep = Weights(), Weights(), KeepWeights(tmp_path)
    fit(model, plain, epochs=2)
    model.set_weights(start)
    model.compile(keras.optimizers.SGD(0.125, use_ema=True, ema_momentum=0.75), "mse")
    history = fit(model, keep, seen, ValidateAverages(), epochs=2).history
    np.testing.assert_array_equal(seen.steps, plain.steps)
    average = np.float64(seen.steps[0])
    for number, weights in enumerate(seen.steps, start=1):
        average = 0.75 * average + 0.25 * weights if number > 1 else average
        if number % 4 == 0:
            np.testing.assert_allclose(seen.tested[number - 1], average, rtol=1e-6)
    assert not np.allclose(average, seen.steps[-1], rtol=1e-3)
    np.testing.assert_array_equal(seen.after, seen.steps[3::4])
    model.load_weights(keep.last)
    np.testing.assert_allclose(model.get_weights()[0], average, rtol=1e-6)
    data = np.ones((8, 2)), np.ones((8, 1))
    assert model.evaluate(*data, verbose=0) == pytest.approx(history["val_loss"][-1], rel=1e-5)


class Send(keras.callbacks.Callback):
    """Sends SIGTERM to this process after a step."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)


class Handlers(keras.callbacks.Callback):
    """Whether SIGTERM is handled by the process, after steps and at the ends of validations."""

    def __init__(self):
        super().__init__()
        self.steps, self.validations = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)

    def on_test_batch_end(self, batch, logs=None):
        self.validations.append(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)


def test_a_signal_is_taken_after_the_step_and_handlers_come_back(model):
    before = signal.getsignal(signal.SIGTERM)
    assert before is signal.SIG_DFL
    stop, handlers = StopOnSignal(), Handlers()
    fit(model, handlers, stop, epochs=2)
    assert handlers.steps == [True] + 7 * [False]
    assert all(handlers.validations)
    assert signal.getsignal(signal.SIGTERM) is before
    log, stop = TrainingLog(1, 100), StopOnSignal()
    with pytest.raises(Stopped, match="Stopped by SIGTERM"):
        fit(model, log, Send(after=6), stop)
    assert (log.step, stop.received) == (6, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
