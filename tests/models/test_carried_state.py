"""Training from the state that the batch before left."""

from pathlib import Path

import keras
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures
from tests import helpers
from tests.helpers import jitted, randomized

VOCABULARY, BATCH, TIME = 23, 3, 9
ARCHITECTURES = pytest.mark.parametrize(
    "name", ["elita_query", "elita_gated", "gla", "transformer"]
)


def make_model(name: str, carried: int | None = BATCH) -> ElitaCausalLM:
    keras.utils.set_random_seed(3)
    sizes = {"hidden_dim": 16, "context_length": TIME, "vocabulary_size": VOCABULARY}
    backbone = ElitaBackbone(**{**architectures[name], **sizes, "num_layers": 1})
    model = ElitaCausalLM(randomized(backbone, scale=0.3), carried_batch_size=carried)
    model.compile(jit_compile=helpers.QUICKEST)
    return model


def stream() -> np.ndarray:
    return np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, 2 * TIME + 1)).astype("int32")


@ARCHITECTURES
def test_the_second_batch_goes_on_where_the_first_ended(name: str) -> None:
    model, ids = make_model(name), stream()
    model.compile(keras.optimizers.SGD(0.0), jit_compile=helpers.QUICKEST)
    losses = []
    for start in (0, TIME):
        x, y = ids[:, start : start + TIME], ids[:, start + 1 : start + TIME + 1]
        losses.append(model.train_on_batch({"token_ids": x}, y))
    initial = model.backbone.get_initial_state(BATCH)
    token_losses = jitted(model.token_losses_with_state)
    whole, state = token_losses(ids[:, :-1], ids[:, 1:], initial)
    expected = [np.mean(np.array(whole)[:, :TIME]), np.mean(np.array(whole)[:, TIME:])]
    assert losses == pytest.approx(expected, abs=1e-5)
    state["segment_id"] = np.zeros(BATCH)  # There are no segments.
    for leaf, value in model.carried_state.read().items():
        helpers.assert_close(value, state[leaf], 1e-5)


@pytest.mark.long
@ARCHITECTURES
def test_no_gradient_goes_into_the_batch_before(name: str) -> None:
    model, ids = make_model(name), stream()
    twin = make_model(name, carried=None)
    x, y = {"token_ids": ids[:, TIME:-1]}, ids[:, TIME + 1 :]
    model.compile(keras.optimizers.SGD(0.0), jit_compile=helpers.QUICKEST)
    model.train_on_batch({"token_ids": ids[:, :TIME]}, ids[:, 1 : TIME + 1])
    constant = {k: helpers.leaves(v)[0] for k, v in model.carried_state.read().items()}
    model.compile(keras.optimizers.SGD(0.1), jit_compile=helpers.QUICKEST)
    model.train_on_batch(x, y)

    def loss(*weights: np.ndarray) -> float:
        twin.set_weights(list(weights))
        losses, _ = jitted(twin.token_losses_with_state)(x["token_ids"], y, constant)
        return float(np.mean(np.array(losses, "float64")))

    # A difference quotient in the direction of the step, with the state held constant.
    before = make_model(name).backbone.get_weights()
    moved = model.backbone.get_weights()
    squared = sum(np.sum((np.float64(m) - b) ** 2) for m, b in zip(moved, before, strict=True))
    ahead, behind = (
        loss(*[b + s * (m - b) for m, b in zip(moved, before, strict=True)]) for s in (0.1, -0.1)
    )
    assert (behind - ahead) / 0.2 == pytest.approx(squared / 0.1, rel=2e-2)


@pytest.mark.long
def test_validation_starts_anew() -> None:
    model, ids = make_model("gla"), stream()
    x, y = {"token_ids": ids[:, :TIME]}, ids[:, 1 : TIME + 1]
    model.compile(keras.optimizers.SGD(0.0), jit_compile=helpers.QUICKEST)
    first = model.evaluate(x, y, verbose=0)
    model.fit(x, y, verbose=0)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(first, abs=1e-6)


def test_it_is_saved(tmp_path: Path) -> None:
    model, ids = make_model("elita_query"), stream()
    model.compile(run_eagerly=not helpers.QUICKEST)
    model.train_on_batch({"token_ids": ids[:, :TIME]}, ids[:, 1 : TIME + 1])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for leaf, value in model.carried_state.read().items():
        helpers.assert_close(loaded.carried_state.read()[leaf], value, 0.0)


def test_it_can_be_reset() -> None:
    model, ids = make_model("transformer"), stream()
    model.compile(keras.optimizers.SGD(0.0), run_eagerly=not helpers.QUICKEST)
    x, y = {"token_ids": ids[:, :TIME]}, ids[:, 1 : TIME + 1]
    first, second = (float(model.train_on_batch(x, y)) for _ in range(2))
    model.reset_metrics()
    model.reset_carried_state()
    for leaf, value in model.backbone.get_initial_state(BATCH).items():
        helpers.assert_close(model.carried_state.read()[leaf], value, 0.0)
    assert abs(first - second) > 1e-4
    assert float(model.train_on_batch(x, y)) == pytest.approx(first, abs=1e-6)
    with pytest.raises(ValueError, match="`carried_batch_size` of this model is None"):
        make_model("gla", carried=None).reset_carried_state()


def test_batches_of_other_rows_are_refused() -> None:
    model, ids = make_model("gla"), stream()
    model.compile(run_eagerly=not helpers.QUICKEST)
    x, y = {"token_ids": ids[:, :TIME]}, ids[:, 1 : TIME + 1]
    before = model.carried_state.read()
    message = rf"`carried_batch_size`={BATCH} rows.*drop_remainder=True"
    twice = {"token_ids": np.tile(x["token_ids"], (2, 1))[1:]}  # Batches of 3 and 2 rows.
    short = {"token_ids": ids[1:, :TIME]}
    for call in (
        lambda: model.train_on_batch(short, y[1:]),
        lambda: model.fit(short, y[1:], verbose=0),
        lambda: model.fit(twice, np.tile(y, (2, 1))[1:], batch_size=BATCH, verbose=0),
        lambda: model.fit(twice, np.tile(y, (2, 1))[1:], batch_size=2, verbose=0),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for leaf, value in model.carried_state.read().items():
        helpers.assert_close(value, before[leaf], 0.0)


@helpers.tensorflow_only
@pytest.mark.parametrize("jit_compile", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_short_last_batch_of_a_dataset(jit_compile: bool) -> None:
    import tensorflow as tf

    model, ids = make_model("gla"), stream()
    model.compile(jit_compile=jit_compile, run_eagerly=not jit_compile)
    data = tf.data.Dataset.from_tensor_slices(({"token_ids": ids[:, :TIME]}, ids[:, 1 : TIME + 1]))
    data = data.repeat(2).take(5)  # Batches of 3 and 2 rows.
    with pytest.raises(ValueError, match=rf"`carried_batch_size`={BATCH} rows"):
        model.fit(data.batch(BATCH), verbose=0)
    assert np.isfinite(model.fit(data.take(BATCH).batch(BATCH), verbose=0).history["loss"])


def test_validation_data_come_before_a_share_of_the_rows() -> None:
    model, ids = make_model("gla"), stream()
    model.compile(run_eagerly=not helpers.QUICKEST)
    data = {"token_ids": ids[:, :TIME]}, ids[:, 1 : TIME + 1]
    how = {"validation_data": data, "validation_split": 0.5, "batch_size": BATCH, "verbose": 0}
    history = model.fit(*data, **how).history
    assert np.isfinite(history["loss"]) and np.isfinite(history["val_loss"])


def test_a_batch_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        make_model("gla", carried=0)
