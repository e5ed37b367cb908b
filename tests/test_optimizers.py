import keras
import numpy as np
import pytest
from keras import ops

from elita_tf.optimizers import MonitoredAdam, MonitoredAdamW, MonitoredMuon

# Numbers that float32 holds: Keras rounds 1 - beta and the powers of beta differently.
BETAS = {"beta_1": 0.875, "beta_2": 0.96875}
OPTIMIZERS = pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (MonitoredAdam, keras.optimizers.Adam, {**BETAS, "global_clipnorm": 0.5}),
        (MonitoredAdamW, keras.optimizers.AdamW, {**BETAS, "weight_decay": 0.25}),
        # The model's only weight is an embedding.
        (MonitoredMuon, keras.optimizers.Muon, {"exclude_embeddings": False}),
    ],
)


def make_model(optimizer, dense=False, **kwargs):
    """A model whose only weight is an embedding, or with `dense` the same as a product.

    Untied, TensorFlow's gradient of the embedding is sparse, and has two parts of one row.
    """
    inputs = keras.Input((4,), dtype="int32")
    if dense:
        kernel = keras.layers.Dense(3, use_bias=False, kernel_initializer="ones")
        embedded = kernel(ops.one_hot(inputs, 5))
    else:
        embedded = keras.layers.Embedding(5, 3, embeddings_initializer="ones")(inputs)
    factor = keras.Input((4, 1))
    outputs = ops.sum(embedded * factor, axis=-1)
    model = keras.Model([inputs, factor], outputs)
    model.compile(optimizer, "mse", **kwargs)
    return model


BOUND = 1e-6  # of float32, in another order of operations
IDS = np.array([[1, 1, 2, 4]])


def step(model, factor):
    model.train_on_batch([IDS, np.full((1, 4, 1), factor, "float32")], np.zeros((1, 4)))
    return [ops.convert_to_numpy(v) for v in (*model.variables, *model.optimizer.variables)]


@OPTIMIZERS
@pytest.mark.parametrize("jit_compile", [True, False])
def test_it_is_the_optimizer_and_knows_the_norm(ours, theirs, arguments, jit_compile):
    optimizer = ours(0.125, skip_nonfinite=True, **arguments)
    reference = make_model(theirs(0.125, **arguments), dense=True, jit_compile=jit_compile)
    models = [make_model(optimizer, jit_compile=jit_compile), reference]
    for factor in (1.0, 2.0):
        before = models[0].get_weights()[0]
        received, expected = (step(model, factor) for model in models)
        np.testing.assert_allclose(received[0], expected[0], rtol=BOUND)
        assert len(received) == len(expected) + 1
        outputs = before[IDS[0]].sum(axis=-1) * factor
        gradient = np.zeros((5, 3))
        np.add.at(gradient, IDS[0], (2 / 4 * outputs * factor)[:, None] * np.ones(3))
        norm = float(ops.convert_to_numpy(optimizer.gradient_norm))
        assert norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)


@OPTIMIZERS
@pytest.mark.parametrize("jit_compile", [True, False])
def test_a_skipped_step_changes_nothing(ours, theirs, arguments, jit_compile):
    optimizer = ours(0.125, skip_nonfinite=True, **arguments)
    model = make_model(optimizer, jit_compile=jit_compile)
    *before, _ = step(model, 1.0)
    for factor in (np.nan, 1e30):
        *after, norm = step(model, factor)
        assert not np.isfinite(norm)
        for value_before, value_after in zip(before, after, strict=True):
            np.testing.assert_array_equal(value_before, value_after)
    *moved, norm = step(model, 1.0)
    assert np.isfinite(norm) and not np.array_equal(moved[0], before[0])


class CountedSchedule(keras.optimizers.schedules.LearningRateSchedule):
    calls = 0

    def __call__(self, step):
        self.calls += 1
        return 0.25 / ops.cast(step + 1, "float32")


@OPTIMIZERS
def test_a_schedule_is_asked_once_a_step_and_followed(ours, theirs, arguments):
    schedule = CountedSchedule()
    optimizer = ours(schedule, **arguments)
    models = make_model(optimizer), make_model(theirs(CountedSchedule(), **arguments), dense=True)
    optimizer.build(models[0].trainable_variables)
    weights = [[step(model, factor)[0] for factor in (1.0, 2.0, 3.0)] for model in models]
    np.testing.assert_allclose(weights[0], weights[1], rtol=BOUND)
    # A compiled step asks while it is traced.
    assert schedule.calls == 1
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == 0.0625


def test_amsgrad_and_a_rate_that_is_set():
    optimizers = [adam(0.125, amsgrad=True) for adam in (MonitoredAdam, keras.optimizers.Adam)]
    models = make_model(optimizers[0]), make_model(optimizers[1], dense=True)
    for rate in (0.125, 0.5):
        for model in models:
            model.optimizer.learning_rate = rate
        received, expected = (step(model, 2.0)[0] for model in models)
        np.testing.assert_allclose(received, expected, rtol=BOUND)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_weights_move_by_the_rate(dtype):
    weight = keras.Variable([1.0, -2.0], dtype=dtype)
    MonitoredAdam(0.25, epsilon=1e-3).apply([ops.convert_to_tensor([4.0, -8.0], dtype)], [weight])
    moved = ops.convert_to_numpy(ops.cast(weight, "float32"))
    np.testing.assert_allclose(moved, [0.75, -1.75], rtol=2**-8)


def test_without_skipping_the_step_is_taken():
    model = make_model(MonitoredAdam(0.125))
    *weights, norm = step(model, np.nan)
    assert not np.isfinite(norm) and not np.isfinite(weights[0]).all()


@OPTIMIZERS
def test_it_is_saved(ours, theirs, arguments, tmp_path):
    model = make_model(ours(0.125, skip_nonfinite=True, **arguments))
    expected = step(model, 1.0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is ours and loaded.optimizer.skip_nonfinite is True
    received = [ops.convert_to_numpy(v) for v in (*loaded.variables, *loaded.optimizer.variables)]
    for ours_now, ours_before in zip(received, expected, strict=True):
        np.testing.assert_array_equal(ours_now, ours_before)
