"""How much labels count: weights of rows, means over tokens whatever the batches are."""

from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM
from tests import helpers
from tests.helpers import jitted, randomized

VOCABULARY, ROWS, TIME = 23, 6, 8
IDS, LABELS = np.random.default_rng(0).integers(0, VOCABULARY, (2, ROWS, TIME)).astype("int32")
# Rows of 1 to 8 real tokens, as texts have them.
MASK = np.arange(TIME) < np.array([[8], [1], [2], [7], [3], [1]])
X = {"token_ids": IDS, "padding_mask": MASK}
ROW = np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.25], "float32")
WEIGHTED_MEAN = keras.losses.SparseCategoricalCrossentropy(
    from_logits=True, reduction="mean_with_sample_weight"
)
QUICKEST = {"jit_compile": helpers.QUICKEST, "run_eagerly": not helpers.QUICKEST}


@pytest.fixture(scope="module")
def model() -> ElitaCausalLM:
    keras.utils.set_random_seed(3)
    backbone = ElitaBackbone(VOCABULARY, num_layers=1, hidden_dim=8, num_heads=2, mixers="softmax")
    return ElitaCausalLM(randomized(backbone, scale=0.4))


def expected_loss(model: ElitaCausalLM, weights: np.ndarray) -> float:
    losses = np.array(jitted(model.token_losses)(IDS, LABELS, MASK), "float64")
    return float(np.sum(losses * weights) / np.sum(weights))


@pytest.mark.parametrize("loss", ["auto", WEIGHTED_MEAN], ids=["auto", "of the logits"])
@pytest.mark.parametrize("batch_size", [2, 4])
def test_losses_are_means_over_tokens(model: ElitaCausalLM, loss: Any, batch_size: int) -> None:
    model.compile(keras.optimizers.SGD(0.0), loss=loss, **QUICKEST)
    expected = expected_loss(model, MASK)
    loss = model.evaluate(X, LABELS, batch_size=batch_size, verbose=0)
    assert loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_size", [2, 4])
def test_a_mean_over_labels_counts_them(model: ElitaCausalLM, batch_size: int) -> None:
    plain = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=plain, **QUICKEST)
    expected = expected_loss(model, MASK * ROW[:, None]) * np.sum(MASK * ROW[:, None]) / MASK.size
    weights = (MASK * ROW[:, None]).astype("float32")
    loss = model.evaluate(X, LABELS, batch_size, sample_weight=weights, verbose=0)
    assert loss == pytest.approx(expected, abs=1e-5)


def test_a_batch_without_a_weight_counts_for_nothing(model: ElitaCausalLM) -> None:
    model.compile(**QUICKEST)
    weights = MASK * np.array([[1], [1], [0], [0], [1], [1]])
    loss = model.evaluate(X, LABELS, 2, sample_weight=weights.astype("float32"), verbose=0)
    assert loss == pytest.approx(expected_loss(model, weights), abs=1e-5)


@pytest.mark.parametrize("loss", ["auto", WEIGHTED_MEAN], ids=["auto", "of the logits"])
@pytest.mark.parametrize("columns", [TIME, ROWS])  # As many as rows: weights could be the columns'.
def test_the_weight_of_a_row_in_evaluate(model: ElitaCausalLM, loss: Any, columns: int) -> None:
    model.compile(loss=loss, weighted_metrics=["accuracy"], **QUICKEST)
    x, y = {"token_ids": IDS[:, :columns]}, LABELS[:, :columns]
    results = [
        model.evaluate(x, y, 4, sample_weight=weights, verbose=0)
        for weights in (np.repeat(ROW[:, None], columns, axis=1), ROW, ROW[:, None])
    ]
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
    np.testing.assert_allclose(results[2], results[0], atol=1e-5)


def test_padding_is_not_trained_on_with_another_loss(model: ElitaCausalLM) -> None:
    model.compile(loss=WEIGHTED_MEAN, **QUICKEST)
    loss = model.evaluate(X, LABELS, 4, verbose=0)
    assert loss == pytest.approx(expected_loss(model, MASK), abs=1e-5)


def test_class_weights_are_refused(model: ElitaCausalLM) -> None:
    model.compile(**QUICKEST)
    weights = {i: float(i) for i in range(VOCABULARY)}
    with pytest.raises(ValueError, match=r"`class_weight`.*sample_weight=np"):
        model.fit(X, LABELS, class_weight=weights, verbose=0)
    with pytest.raises(ValueError, match=r"`class_weight`.*sample_weight=np"):
        model.train_on_batch(X, LABELS, class_weight=weights)


def test_the_loss_of_a_model_of_16_bits_counts_all_tokens() -> None:
    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float16")
    try:
        backbone = ElitaBackbone(VOCABULARY, 1, 8, 2, mixers="softmax", dtype="float32")
        model = ElitaCausalLM(backbone)
        model.compile(**QUICKEST)
        many = np.full((40, TIME), 300.0, "float32")  # A sum of 96,000.
        loss = model.evaluate(
            {"token_ids": many.astype("int32") % 7}, many % 7, 20, many, verbose=0
        )
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)
    assert 0 < loss < 10


@pytest.mark.long
@pytest.mark.parametrize("jit_compile", ["auto", False])
def test_losses_of_fit_are_means_over_tokens(model: ElitaCausalLM, jit_compile: Any) -> None:
    model.compile(keras.optimizers.SGD(0.0), jit_compile=jit_compile)
    expected = expected_loss(model, MASK)
    data = {"validation_data": (X, LABELS), "validation_batch_size": 4}
    history = model.fit(X, LABELS, batch_size=1, epochs=2, **data, verbose=0).history
    assert history["loss"] + history["val_loss"] == pytest.approx([expected] * 4, abs=1e-5)
