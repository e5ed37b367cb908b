"""Training on several simulated devices is training on one."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures
from elita_tf.runs import devices, training
from elita_tf.runs.recipe import load_recipe
from elita_tf.runs.request import Mode, opened
from tests import helpers

ROOT = Path(__file__).parents[2]
RECIPE = SimpleNamespace(batch_size=8, carry_state=False, clip_norm=0.0)
jax_only = pytest.mark.skipif(helpers.BACKEND != "jax", reason="needs JAX's simulated devices")

# TensorFlow makes its devices once in a process.
TWO_DEVICES = """
import sys

import tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
from elita_tf.runs import training

sys.exit(training.main(["--recipe", sys.argv[1], "--run_dir", sys.argv[2], "--devices", "data"]))
"""


def losses(folder: Path) -> list[list[float]]:
    """Training and validation loss of every interval."""
    with (folder / "metrics.csv").open() as file:
        return [[float(row[name]) for name in ("loss", "val_loss")] for row in csv.DictReader(file)]


def fit(place: devices.Devices) -> tuple[list[float], ElitaCausalLM]:
    """The loss after each of 20 steps, and the model.

    In float64: training amplifies float32's differences in the order of sums a hundredfold.
    """
    start = np.random.default_rng(0).integers(0, 32, (20 * RECIPE.batch_size, 1))
    ids = ((start + 3 * np.arange(9)) % 32).astype("int32")
    history: list[float] = []
    log = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: history.append(logs["loss"])
    )
    with place.scope():
        keras.utils.set_random_seed(0)
        sizes = {"num_layers": 2, "hidden_dim": 16, "num_heads": 4, "context_length": 8}
        arguments = {**architectures["elita_query"], **sizes}
        arguments["mixers"] = ["attention2_gated", "gla"]
        model = ElitaCausalLM(ElitaBackbone(32, **arguments, dtype="float64"))
        model.compile(keras.optimizers.Adam(1e-3, global_clipnorm=1.0))
        x, y = {"token_ids": ids[:, :-1]}, ids[:, 1:]
        options = {"batch_size": RECIPE.batch_size, "shuffle": False, "verbose": 0}
        model.fit(x, y, callbacks=[log], **options)
    return history, model


@pytest.fixture(scope="module")
def on_one() -> list[float]:
    return fit(devices.find("one", RECIPE))[0]


@jax_only
@pytest.mark.parametrize(("kind", "parts"), [("data", 1), ("model=4", 4)])
def test_the_losses_are_those_of_one_device(on_one: list[float], kind: str, parts: int) -> None:
    history, model = fit(devices.find(kind, RECIPE))
    assert on_one[-1] < 0.97 * on_one[0]
    np.testing.assert_allclose(history, on_one, atol=1e-5)
    cut = whole = held = 0
    for variable in model.trainable_variables:
        size = variable.value.nbytes
        shard = variable.value.addressable_shards[0].data.nbytes
        assert shard in (size, size // parts), variable.path
        whole, held, cut = whole + size, held + shard, cut + (shard < size) * size
    assert held == whole - cut + cut // parts
    # All but norms, biases, positions and small factors.
    assert cut > 0.85 * whole or parts == 1
    slots = model.optimizer.variables
    assert sum(x.value.addressable_shards[0].data.nbytes for x in slots) < 2.01 * held + 64


@jax_only
def test_a_run_on_jax(run_dir: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    arguments = ["--recipe", str(tiny_recipe), "--run_dir", str(tmp_path)]
    assert training.main([*arguments, "--devices", "model=2"]) == 0
    np.testing.assert_allclose(losses(tmp_path), losses(run_dir), atol=1e-4)
    assert (tmp_path / "sample.txt").read_text()


@pytest.mark.long
@helpers.tensorflow_only
def test_a_run_on_tensorflow(run_dir: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", TWO_DEVICES, str(tiny_recipe), str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    np.testing.assert_allclose(losses(tmp_path), losses(run_dir), atol=1e-4)


def test_a_second_process_goes_on_and_writes_elsewhere(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "find", lambda *_: devices.Devices(is_first=False))
    recipe = load_recipe(str(run_dir / "recipe.toml"), ["steps=6"])
    before = sorted(run_dir.rglob("*"))
    with opened(recipe, run_dir, None, "data", Mode(force=True)) as request:
        assert request.checkpoint.step == 5 and request.run_dir.is_dir()
        assert request.run_dir != run_dir and sorted(run_dir.rglob("*")) == before
        best = "best.weights.h5"
        assert (request.run_dir / best).read_bytes() == (run_dir / best).read_bytes()
    assert not request.run_dir.exists()


MISTAKES = {
    "tensorflow": [
        ("model=2", "KERAS_BACKEND=jax"),
        ("tpu", "KERAS_BACKEND=jax and --devices data"),
        ("gpu", "expected one, data, model=K or tpu"),
        ("model=two", "expected one, data"),
    ],
    "jax": [
        ("tpu", "TensorFlow's"),
        ("model=3", "8 devices do not divide"),
        ("gpu", "expected one"),
    ],
}


@pytest.mark.parametrize(("kind", "message"), MISTAKES[helpers.BACKEND])
def test_mistakes_are_explained(kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        devices.find(kind, RECIPE)


@jax_only
def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="a batch of 6 does not divide over 8 parts"):
        devices.find("data", SimpleNamespace(**{**vars(RECIPE), "batch_size": 6}))


@helpers.tensorflow_only
@pytest.mark.parametrize("change", [{"carry_state": True}, {"clip_norm": 1.0}])
def test_what_tensorflow_has_on_one_device_only(change: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))}.*KERAS_BACKEND=jax"):
        devices.find("data", SimpleNamespace(**{**vars(RECIPE), **change}))


@helpers.tensorflow_only
def test_several_machines_need_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}}')
    with pytest.raises(ValueError, match="TF_CONFIG.*KERAS_BACKEND=jax"):
        devices.find("data", RECIPE)
