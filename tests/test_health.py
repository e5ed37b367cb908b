import csv

import keras
import numpy as np
import pytest

from elita_tf.callbacks import Health, MetricsFile
from elita_tf.optimizers import MonitoredAdam


def fit(factors, *callbacks, skip=False, epochs=1):
    """A step per factor; the loss is (weight * factor)^2, its gradient 2 * weight * factor^2."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.layers[0].kernel.assign([[1.0]])
    # Without momentum and so slowly that the weight stays at 1.
    model.compile(MonitoredAdam(1e-9, skip_nonfinite=skip), "mse")
    x = np.array(factors, "float32")[:, None]
    model.fit(
        x,
        np.zeros_like(x),
        batch_size=1,
        epochs=epochs,
        steps_per_epoch=len(factors) // epochs,
        callbacks=list(callbacks),
        shuffle=False,
        verbose=0,
    )
    return model


class Scaled(keras.layers.Layer):
    """x times a weight."""

    def build(self, shape):
        self.weight = self.add_weight((1,), "ones")

    def call(self, x):
        return x * self.weight


def fit_in_float16(*factors, scale):
    """The loss, and the gradient of the weight, are 4096 * factor; scaled, 65504 is the limit."""
    model = keras.Sequential([keras.Input((1,)), Scaled(dtype="mixed_float16")])
    optimizer = keras.optimizers.LossScaleOptimizer(MonitoredAdam(1e-9), initial_scale=scale)
    model.compile(optimizer, lambda _, y: keras.ops.mean(y), jit_compile=False)
    x, health = 4096 * np.array(factors, "float32")[:, None], Health()
    history = model.fit(x, x, batch_size=1, shuffle=False, verbose=0, callbacks=[health]).history
    return history, health, float(keras.ops.convert_to_numpy(optimizer.dynamic_scale))


def test_overflows_of_a_scaled_loss_are_skipped_steps():
    history, health, scale = fit_in_float16(0.25, 1.0, 0.5, scale=32.0)
    assert scale == 16.0 and (health.step, health.skipped_steps) == (3, 1)
    assert history["skipped_steps"] == [1]
    assert history["gradient_norm"] == history["loss"] == [pytest.approx(4096 * 0.375)]


def test_a_loss_that_is_not_finite_stops_in_float16_too():
    with pytest.raises(FloatingPointError, match="Step 2: loss nan"):
        fit_in_float16(0.25, np.nan, 0.5, scale=1.0)


def test_another_optimizer_is_refused():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="elita_tf.optimizers"):
        model.fit(np.ones((2, 1)), np.ones((2, 1)), callbacks=[Health()], verbose=0)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_mean_norm_of_each_epoch_is_logged(tmp_path):
    fit([1.0, 2.0, 3.0, 1.0], Health(), MetricsFile(tmp_path / "m.csv"), epochs=2)
    norms = [float(row["gradient_norm"]) for row in rows(tmp_path / "m.csv")]
    assert norms == pytest.approx([(2 + 8) / 2, (18 + 2) / 2], rel=1e-5)
    assert [row["skipped_steps"] for row in rows(tmp_path / "m.csv")] == ["0", "0"]


@pytest.mark.parametrize("factor", [np.nan, np.inf, 1e25])
def test_what_is_not_finite_stops_at_its_step(factor):
    health = Health()
    with pytest.raises(FloatingPointError, match="Step 3: loss .*, norm of the gradient .*: not"):
        fit([1.0, 2.0, factor, 1.0], health)
    assert health.step == 3


def test_skipped_steps_are_counted_and_take_no_part(tmp_path, caplog):
    health = Health()
    factors = [1.0, np.nan, np.nan, 2.0, 3.0, 3.0, np.inf, 3.0]
    fit(factors, health, MetricsFile(tmp_path / "m.csv"), skip=True, epochs=2)
    first, second = rows(tmp_path / "m.csv")
    assert float(first["loss"]) == pytest.approx((1 + 4) / 2, rel=1e-5)
    assert float(first["gradient_norm"]) == pytest.approx((2 + 8) / 2, rel=1e-5)
    assert float(second["loss"]) == pytest.approx(9, rel=1e-5)
    assert (int(first["skipped_steps"]), int(second["skipped_steps"])) == (2, 3)
    assert "Step 2: loss nan" in caplog.text and "left out, 3 so far" in caplog.text


def test_an_epoch_of_skipped_steps_stops():
    with pytest.raises(FloatingPointError, match="Step 4 ends an epoch without a finite gradient"):
        fit([1.0, 1.0, np.nan, np.nan], Health(), skip=True, epochs=2)


def test_it_goes_on_where_it_was():
    first, second = Health(), Health()
    first.set_model(fit([2.0, 3.0], first))
    second.restore(first.state())
    second.set_model(first.model)
    logs = {}, {}
    first.on_epoch_end(0, logs[0])
    second.on_epoch_end(0, logs[1])
    expected = {"gradient_norm": pytest.approx(13.0, rel=1e-5), "skipped_steps": 0}
    assert logs[0] == logs[1] == expected
