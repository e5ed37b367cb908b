"""The language model: its loss, training, evaluation and saving."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures
from tests import helpers
from tests.helpers import jitted, randomized

VOCABULARY, BATCH, TIME = 23, 4, 9


def small_model(name: str = "elita_query", **kwargs: Any) -> ElitaCausalLM:
    sizes = {"hidden_dim": 16, "context_length": TIME, "vocabulary_size": VOCABULARY}
    if name != "hybrid":
        sizes["num_layers"] = 1
    model = ElitaCausalLM(ElitaBackbone(**{**architectures[name], **sizes, **kwargs}))
    model.compile(jit_compile=helpers.QUICKEST)
    return model


def windows() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    ids = rng.integers(0, VOCABULARY, (BATCH, TIME + 1)).astype("int32")
    return {"token_ids": ids[:, :-1]}, ids[:, 1:], rng.random((BATCH, TIME)).astype("float32")


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(0)


def materialised_loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_equals_that_of_the_logits(tie_embeddings: bool, weighted: bool) -> None:
    model = randomized(small_model(tie_embeddings=tie_embeddings), scale=0.2)
    x, y, weights = windows()
    sample_weight = weights if weighted else None
    expected = float(materialised_loss()(y, jitted(model)(x), sample_weight))
    fused = model.evaluate(x, y, sample_weight=sample_weight, verbose=0)
    model.compile(loss=materialised_loss(), jit_compile=helpers.QUICKEST)
    materialised = model.evaluate(x, y, sample_weight=sample_weight, verbose=0)
    assert fused == pytest.approx(expected, abs=1e-5)
    assert materialised == pytest.approx(expected, abs=1e-5)


@pytest.mark.long
def test_compiling_again_forgets_the_loss_and_the_metrics() -> None:
    model = randomized(small_model(), scale=0.2)
    x, y, _ = windows()
    expected = model.evaluate(x, y, verbose=0)
    model.compile(loss=materialised_loss(), weighted_metrics=["accuracy"], jit_compile=False)
    model.evaluate(x, y, verbose=0)
    model.compile(loss=lambda y, logits: 7.0 + 0 * logits[..., 0], jit_compile=helpers.QUICKEST)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(7.0)
    model.compile(jit_compile=helpers.QUICKEST)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(expected, abs=1e-6)


@helpers.tensorflow_only
def test_a_step_calls_the_backbone_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras calls the model for its logits too, which would take as long to trace as the loss."""
    calls, call = [], ElitaBackbone.call
    monkeypatch.setattr(ElitaBackbone, "call", lambda *a, **k: calls.append(a) or call(*a, **k))
    model = small_model()
    model.compile(jit_compile=False, run_eagerly=True)
    x, y, _ = windows()
    for step in (model.train_on_batch, model.test_on_batch):
        calls.clear()
        step(x, y)
        assert len(calls) == 1
    # Outside of a step the model gives its logits as ever.
    assert tuple(model(x, training=True).shape) == (BATCH, TIME, VOCABULARY)


class LogitsLossLM(ElitaCausalLM):
    """A model whose loss is its own, of the logits."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True) -> Any:
        return keras.ops.mean(keras.ops.logsumexp(y_pred, axis=-1))


class LogitsMetricLM(ElitaCausalLM):
    """A model that reports something of the logits."""

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict:
        return {"reported": keras.ops.mean(keras.ops.logsumexp(y_pred, axis=-1))}


@pytest.mark.parametrize("model_class", [LogitsLossLM, LogitsMetricLM])
def test_a_subclass_may_use_the_logits(model_class: type[ElitaCausalLM]) -> None:
    model = randomized(model_class(small_model().backbone))
    model.compile(jit_compile=helpers.QUICKEST)
    x, y, _ = windows()
    logits = np.array(jitted(model)(x), "float64")
    expected = np.log(np.exp(logits).sum(-1)).mean()
    figures = model.evaluate(x, y, verbose=0, return_dict=True)
    figure = "reported" if model_class is LogitsMetricLM else "loss"
    assert figures[figure] == pytest.approx(expected, abs=1e-5)


def test_loss_weights_need_a_loss() -> None:
    with pytest.raises(ValueError, match=r"`loss_weights`.*received \[2.0\]"):
        small_model().compile(loss_weights=[2.0])


@pytest.mark.long
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_one_step_trains_as_with_the_logits(tie_embeddings: bool) -> None:
    x, y, weights = windows()
    after = []
    for loss in ("auto", materialised_loss()):
        model = randomized(small_model(tie_embeddings=tie_embeddings), scale=0.2)
        model.compile(keras.optimizers.SGD(0.1), loss=loss, jit_compile=helpers.QUICKEST)
        model.fit(x, y, sample_weight=weights, verbose=0)
        after.append(model.get_weights())
    for fused, materialised in zip(*after, strict=True):
        np.testing.assert_allclose(fused, materialised, atol=2e-6)


@pytest.mark.long
def test_overfits_one_batch() -> None:
    model = small_model("hybrid")
    model.compile(keras.optimizers.Adam(2e-2), jit_compile=helpers.QUICKEST)
    x, y, _ = windows()
    first = model.evaluate(x, y, verbose=0)
    repeated = {"token_ids": np.tile(x["token_ids"], (100, 1))}
    model.fit(repeated, np.tile(y, (100, 1)), batch_size=BATCH, shuffle=False, verbose=0)
    assert first == pytest.approx(np.log(VOCABULARY), abs=0.3)
    assert model.evaluate(x, y, verbose=0) < 0.05


@pytest.mark.long
def test_every_variable_is_trained() -> None:
    model = randomized(small_model("hybrid"), scale=0.2)
    # Weight decay is off, so only a gradient moves a variable.
    model.compile(keras.optimizers.SGD(1.0), jit_compile=helpers.QUICKEST)
    before = [np.array(v) for v in model.trainable_variables]
    x, y, _ = windows()
    model.fit(x, y, verbose=0)
    still = [
        v.path
        for v, b in zip(model.trainable_variables, before, strict=True)
        if np.array_equal(np.array(v), b)
    ]
    assert still == []


def test_token_losses_are_those_of_the_logits() -> None:
    model = randomized(small_model("gla"), scale=0.2)
    x, y, _ = windows()
    logits = np.array(jitted(model)(x), "float64")
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probabilities, y[..., None], -1)[..., 0]
    losses = np.array(jitted(model.token_losses)(x["token_ids"], y))
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_published_optimizer_is_the_default() -> None:
    optimizer = small_model().optimizer
    rates = [float(optimizer._learning_rate(step)) for step in (0, 99, 9_999)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4], rel=1e-6)
    assert (optimizer.beta_1, optimizer.beta_2) == (0.9, 0.99)


@pytest.mark.long
def test_saved_model_goes_on_where_it_stopped(tmp_path: Path) -> None:
    x, y, _ = windows()
    model = small_model()
    model.fit(x, y, verbose=0, epochs=3)
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(np.array(jitted(reloaded)(x)), np.array(jitted(model)(x)))
    model.fit(x, y, verbose=0)
    reloaded.fit(x, y, verbose=0)
    for continued, resumed in zip(model.get_weights(), reloaded.get_weights(), strict=True):
        np.testing.assert_array_equal(continued, resumed)


def test_loss_under_mixed_precision_is_near_float32() -> None:
    x, y, weights = windows()
    losses = []
    for dtype in ("float32", "mixed_bfloat16"):
        model = randomized(small_model("gla", dtype=dtype), scale=0.2)
        losses.append(model.evaluate(x, y, sample_weight=weights, verbose=0))
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert losses[1] != losses[0]


@pytest.mark.long
def test_regularization_joins_the_loss() -> None:
    x, y, _ = windows()
    model = randomized(small_model(), scale=0.2)
    plain = model.evaluate(x, y, verbose=0)
    kernel = model.backbone.blocks[0].mixer.layer.output_projection
    kernel.kernel.regularizer = keras.regularizers.L2(0.5)
    penalty = 0.5 * float(np.sum(np.square(np.array(kernel.kernel))))
    model.compile(jit_compile=helpers.QUICKEST)
    assert model.evaluate(x, y, verbose=0) == pytest.approx(plain + penalty, rel=1e-5)


# Together they have every mixer, decay and feed-forward.
@pytest.mark.long
@pytest.mark.parametrize("name", ["elita", "elita_gated", "gla", "transformer"])
def test_rematerialised_training_is_the_same(name: str) -> None:
    x, y, weights = windows()
    x = {**x, "padding_mask": np.arange(TIME)[None] < np.array([[TIME], [4], [7], [1]])}
    after = []
    for rematerialize in (False, True):
        keras.utils.set_random_seed(5)
        model = randomized(small_model(name, dropout=0.3), scale=0.2)
        model.rematerialize = rematerialize
        model.compile(keras.optimizers.SGD(0.1), jit_compile=helpers.QUICKEST)
        model.fit(x, y, sample_weight=weights, verbose=0)
        after.append(model.get_weights())
    for kept, computed_again in zip(*after, strict=True):
        np.testing.assert_allclose(computed_again, kept, atol=2e-6)


def test_rematerialising_is_saved_and_excludes_a_carried_state() -> None:
    backbone = small_model().backbone
    model = ElitaCausalLM(backbone, rematerialize=True)
    assert ElitaCausalLM.from_config(model.get_config()).rematerialize is True
    with pytest.raises(ValueError, match="carried_batch_size=3"):
        ElitaCausalLM(backbone, carried_batch_size=3, rematerialize=True)


@helpers.tensorflow_only
@pytest.mark.parametrize(("replicas", "expected"), [(1, True), (2, False)])
def test_trains_with_xla_on_one_device(
    replicas: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = SimpleNamespace(num_replicas_in_sync=replicas)
    monkeypatch.setattr(ElitaCausalLM, "distribute_strategy", strategy)
    monkeypatch.setattr(ElitaCausalLM, "_resolve_auto_jit_compile", lambda self: False)
    model = ElitaCausalLM(small_model().backbone)
    assert model.jit_compile is expected
    model.make_generate_function()
    assert model.jit_compile is expected
    model.compile(jit_compile=not expected)
    assert model.jit_compile is not expected
    model.compile(run_eagerly=True)
    assert model.jit_compile is False
