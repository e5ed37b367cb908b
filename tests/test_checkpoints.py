"""Checkpoints as files, and training that goes on from them bit for bit."""

import csv
import os

import keras
import numpy as np
import pytest

from elita_tf.callbacks import (
    Checkpoints,
    Health,
    KeepWeights,
    LossPlot,
    MetricsFile,
    TrainingLog,
    ValidateAverages,
    checkpoint_files,
    newest_checkpoint,
)
from elita_tf.callbacks.checkpoint_files import save_checkpoint
from elita_tf.callbacks.checkpoints import stable_paths
from elita_tf.optimizers import MonitoredAdam

BATCH, STEPS, EPOCH_STEPS = 2, 10, 4
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(BATCH * STEPS, 3)).astype("float32")
Y = RANDOM.normal(size=(BATCH * STEPS, 1)).astype("float32")


class Killed(BaseException):
    """What no handler catches."""


class Kill(keras.callbacks.Callback):
    """Kills after a step, or in the validation after it."""

    def __init__(self, after, in_validation):
        super().__init__()
        self.left, self.in_validation = after, in_validation

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0 and not self.in_validation:
            raise Killed

    def on_test_end(self, logs=None):
        if self.left == 0:
            raise Killed


def make_model(units=4, hidden=keras.layers.Dense, average=None, **options):
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dropout(0.5), hidden(units, **options), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(MonitoredAdam(0.125, **(average or {})), "mse", metrics=["mae"])
    return model


def train(folder, kill=None, seconds=0.0, **options):
    """Trains in a folder, from its newest checkpoint if it has one."""
    resumed = newest_checkpoint(folder)
    start = resumed.start_step if resumed else 0
    kept = [
        TrainingLog(1, STEPS),
        KeepWeights(folder),
        MetricsFile(folder / "metrics.csv", resumed is not None),
        LossPlot(folder / "loss.png"),
    ]
    checkpoints = Checkpoints(folder, kept, seconds=seconds, resumed=resumed)
    averages = [ValidateAverages()] if "average" in options else []
    model = make_model(**options)
    model.fit(
        X[start * BATCH :],
        Y[start * BATCH :],
        batch_size=BATCH,
        steps_per_epoch=EPOCH_STEPS,
        initial_epoch=start // EPOCH_STEPS,
        epochs=3,
        validation_data=(X, Y),
        callbacks=[*kept, checkpoints, *([kill] if kill else []), *averages],
        shuffle=False,
        verbose=0,
    )
    return model, kept


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    for row in found:
        assert float(row.pop("tokens_per_second")) >= 0  # a time: no two runs share it
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(folder)


@pytest.mark.parametrize(
    ("after", "in_validation", "seconds"),
    [
        (3, False, 0),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                *[(1, False, 0), (4, False, 0), (7, False, 1e9)],
                *[(8, True, 1e9), (10, True, 0)],
            ]
        ),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path, after, in_validation, seconds):
    with pytest.raises(Killed):
        train(tmp_path, Kill(after, in_validation), seconds=seconds)
    saved = newest_checkpoint(tmp_path)
    assert saved.step == (after if seconds == 0 else after // EPOCH_STEPS * EPOCH_STEPS)
    assert_same((tmp_path, *train(tmp_path)), whole)


@pytest.mark.long
@pytest.mark.parametrize(("after", "in_validation"), [(3, False), (8, True)])
def test_averages_go_on_bit_for_bit(tmp_path, after, in_validation):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    options = {"average": {"use_ema": True, "ema_momentum": 0.75}}
    for folder in (killed, whole):
        folder.mkdir()
    with pytest.raises(Killed):
        train(killed, Kill(after, in_validation), **options)
    assert_same((killed, *train(killed, **options)), (whole, *train(whole, **options)))


def assert_same(received_run, expected_run):
    tmp_path, model, kept = received_run
    folder, expected_model, expected_kept = expected_run
    expected, received = newest_checkpoint(folder), newest_checkpoint(tmp_path)
    assert received.step == expected.step == STEPS
    assert received.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(received.arrays[name], array)
    assert rows(tmp_path) == rows(folder)
    assert [int(row["step"]) for row in rows(folder)] == [4, 8, 10]
    assert kept[1].best_loss == expected_kept[1].best_loss
    assert kept[3].points == expected_kept[3].points
    for name in ("best.weights.h5", "last.weights.h5"):
        model.load_weights(tmp_path / name)
        expected_model.load_weights(folder / name)
        for ours, theirs in zip(model.get_weights(), expected_model.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_state_has_seeds_and_means_and_moments(whole):
    model = whole[1]
    checkpoint = newest_checkpoint(whole[0])
    groups = {name.split("/")[0] for name in checkpoint.arrays}
    assert groups == {"model", "optimizer", "metric"}
    seeds = [v for v in model.variables if v.path.endswith("seed_generator_state")]
    assert len(seeds) == 1
    assert len(checkpoint.arrays) == sum(
        map(len, (model.variables, model.optimizer.variables, model.metrics_variables))
    )
    assert len(model.metrics_variables) == 4  # totals and counts of loss and mae


def test_another_model_is_refused(whole, tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, Kill(2, False))
    message = "to another model.*: model/sequential_0/dense_0/.* differ in shape"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, units=5)


class OtherDense(keras.layers.Dense):
    """Another layer with variables of the same shapes."""

    def call(self, inputs):
        return -super().call(inputs)


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "its layers are .*'linear'.*, those of the model .*'relu'"),
        ({"hidden": OtherDense}, "model/sequential_0/dense_1/.*model/sequential_0/other_dense"),
        ({"hidden": OtherDense, "name": "dense"}, "those of the model .*'OtherDense'"),
    ],
)
def test_another_layer_of_equal_shapes_is_refused(tmp_path, options, message):
    with pytest.raises(Killed):
        train(tmp_path, Kill(2, False))
    with pytest.raises(ValueError, match=message):
        train(tmp_path, **options)


def test_two_callbacks_of_one_class_are_refused(tmp_path):
    kept = [KeepWeights(tmp_path / "a"), TrainingLog(1, 2), KeepWeights(tmp_path / "b")]
    with pytest.raises(ValueError, match="one callback of each class; received KeepWeights, Tr"):
        Checkpoints(tmp_path, kept)


def test_a_callback_without_a_state_in_the_checkpoint(tmp_path):
    model, checkpoints = make_model(), Checkpoints(tmp_path, seconds=0)
    arguments = {"batch_size": BATCH, "steps_per_epoch": 2, "verbose": 0}
    model.fit(X, Y, callbacks=[checkpoints], **arguments)
    resumed = newest_checkpoint(tmp_path)
    log = TrainingLog(1, STEPS)
    checkpoints = Checkpoints(tmp_path, [log], resumed=resumed)
    with pytest.raises(ValueError, match="it has no state of TrainingLog"):
        make_model().fit(X, Y, callbacks=[log, checkpoints], **arguments)


def test_paths_do_not_depend_on_what_was_built_before():
    models = [make_model(), make_model()]
    assert models[0].variables[0].path != models[1].variables[0].path
    for kind in ("variables", "optimizer"):
        groups = [getattr(model, kind) for model in models]
        paths = [stable_paths(getattr(group, "variables", group)) for group in groups]
        assert paths[0] == paths[1] and len(set(paths[0])) == len(paths[0])
    twins = [keras.Variable(0.0, name="a"), keras.Variable(0.0, name="a")]
    assert stable_paths(twins) == ["a_0", "a_0#1"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_never_saved(tmp_path, value):
    class Spoil(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kernel = self.model.trainable_variables[0]
            if batch == 2:
                kernel.assign(keras.ops.full(kernel.shape, value))

    model, checkpoints = make_model(), Checkpoints(tmp_path, seconds=0)
    with pytest.raises(FloatingPointError, match="After step 3, .*kernel is not finite"):
        arguments = {"steps_per_epoch": 5, "verbose": 0, "callbacks": [Spoil(), checkpoints]}
        model.fit(X, Y, batch_size=BATCH, **arguments)
    assert newest_checkpoint(tmp_path).step == 2


@pytest.mark.parametrize("step", [2, 3])
def test_a_step_that_was_left_out_is_saved(tmp_path, step):
    x = X.copy()
    x[BATCH * (step - 1)] = np.nan
    model, health = make_model(), Health()
    model.optimizer.skip_nonfinite = True
    arguments = {"steps_per_epoch": 3, "verbose": 0, "shuffle": False}
    callbacks = [health, Checkpoints(tmp_path, [health], seconds=0)]
    model.fit(x, Y, batch_size=BATCH, callbacks=callbacks, **arguments)
    saved = newest_checkpoint(tmp_path)
    assert (saved.step, health.skipped_steps) == (3, 1)
    left_out = [name for name, x in saved.arrays.items() if not np.isfinite(x).all()]
    assert [name.rsplit("/")[-1] for name in left_out] == ["gradient_norm_0"] * (step == 3)


def test_columns_stay_in_their_places(tmp_path):
    """Whatever the resumed run logs."""
    path, logs = tmp_path / "m.csv", {"loss": 2.0, "step": 3, "val_loss": 1.5}

    def write(resumed, logs, state=None):
        file = MetricsFile(path, resumed)
        file.set_model(keras.Sequential())
        file.on_train_begin()
        if state:
            file.restore(state)
        file.on_epoch_end(len(logs), logs)
        state = file.state()
        file.on_train_end()
        return state

    state = write(False, logs)
    write(True, {"skipped_steps": 5, "step": 7, "loss": 1.0, "val_loss": 0.5}, state)
    lines = b"epoch,loss,step,val_loss", b"3,2.0,3,1.5", b"4,1.0,7,0.5"
    assert path.read_bytes() == b"".join(line + b"\r\n" for line in lines)


def save(folder, *steps):
    return [save_checkpoint(folder, step, {"a": np.full(99, step)}, {"b": step}) for step in steps]


def test_the_last_two_are_kept(tmp_path):
    paths = save(tmp_path / "new", 9, 10, 100)
    assert sorted((tmp_path / "new").iterdir()) == sorted(paths[1:])
    checkpoint = newest_checkpoint(tmp_path / "new")
    assert (checkpoint.path, checkpoint.step, checkpoint.metadata) == (paths[2], 100, {"b": 100})
    np.testing.assert_array_equal(checkpoint.arrays["a"], np.full(99, 100))
    assert newest_checkpoint(tmp_path / "nothing") is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def test_one_of_another_version_is_refused_in_words(tmp_path):
    np.savez(tmp_path / "old.npz", kernel=np.ones(3), notes=np.zeros(2))
    sha256 = checkpoint_files.file_sha256(tmp_path / "old.npz")
    (tmp_path / "old.npz").rename(tmp_path / f"step-00000003-{sha256}.npz")
    with pytest.raises(ValueError, match="another version of elita_tf.* begin anew"):
        newest_checkpoint(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1  # it is not damaged


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_one_gives_way_to_the_one_before(tmp_path, caplog, damage):
    first, second = save(tmp_path, 1, 2)
    damage(second)
    assert newest_checkpoint(tmp_path).path == first
    assert f"{second} is damaged" in caplog.text
    # The damaged one does not push the good ones out.
    assert newest_checkpoint(save(tmp_path, 2)[0].parent).step == 2
    assert first.exists()
    for path in tmp_path.glob("*.npz"):
        damage(path)
    for _ in range(2):
        with pytest.raises(OSError, match="Every checkpoint in .* is damaged"):
            newest_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["np.savez", "os.fsync", "os.replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, name):
    (first,) = save(tmp_path, 1)
    module, function = name.split(".")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr({"np": np, "os": os}[module], function, full)
        with pytest.raises(OSError, match="No space"):
            save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == [first]
    assert newest_checkpoint(tmp_path).step == 1


def test_what_a_killed_write_left_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / checkpoint_files.UNFINISHED).write_bytes(b"half")
    assert newest_checkpoint(tmp_path).step == 1
    second = save(tmp_path, 2)[0]
    assert len(list(tmp_path.iterdir())) == 2 and second.exists()
