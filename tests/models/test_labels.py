"""What counts in the loss, and ids outside of the vocabulary: never a wrong number in silence."""

from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM
from tests import helpers
from tests.helpers import jitted, randomized

VOCABULARY, BATCH, TIME = 23, 3, 7
IDS, LABELS = np.random.default_rng(0).integers(0, VOCABULARY, (2, BATCH, TIME)).astype("int32")
MASK = np.arange(TIME) < np.array([[TIME], [2], [5]])
RNG_WEIGHTS = np.random.default_rng(1).random((BATCH, TIME)).astype("float32")


def make_model(**compiled: Any) -> ElitaCausalLM:
    keras.utils.set_random_seed(3)
    backbone = ElitaBackbone(VOCABULARY, num_layers=1, hidden_dim=8, num_heads=2, mixers="softmax")
    model = ElitaCausalLM(randomized(backbone, scale=0.4))
    quickest = {"jit_compile": helpers.QUICKEST, "run_eagerly": not helpers.QUICKEST}
    model.compile(keras.optimizers.SGD(0.5), **(compiled or quickest))
    return model


def trained(labels: Any, weights: Any = None, x: Any = None, **compiled: Any) -> Any:
    """The loss of one step, and the weights after it."""
    model = make_model(**compiled)
    loss = model.train_on_batch(x or {"token_ids": IDS}, labels, weights)
    return float(loss), model.get_weights()


def assert_same(received: Any, expected: Any) -> None:
    assert received[0] == pytest.approx(expected[0], abs=1e-6)
    for one, other in zip(received[1], expected[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_negative_labels_are_left_out() -> None:
    expected = trained(LABELS, MASK.astype("float32"))
    assert_same(trained(np.where(MASK, LABELS, -1)), expected)
    expected = trained(LABELS, MASK * RNG_WEIGHTS)
    assert_same(trained(np.where(MASK, LABELS, -100), RNG_WEIGHTS), expected)


def test_negative_labels_have_no_loss_of_their_own() -> None:
    model = make_model()
    losses = np.array(jitted(model.token_losses)(IDS, np.where(MASK, LABELS, -100)))
    whole = np.array(jitted(model.token_losses)(IDS, LABELS))
    np.testing.assert_allclose(losses, whole * MASK, atol=1e-6)
    assert whole.min() > 0


def test_labels_at_padding_are_left_out_unless_there_are_weights() -> None:
    x, ones = {"token_ids": IDS, "padding_mask": MASK}, np.ones((BATCH, TIME), "float32")
    masked = trained(LABELS, MASK.astype("float32"), x)
    assert_same(trained(LABELS, None, x), masked)
    assert abs(trained(LABELS, ones, x)[0] - masked[0]) > 1e-3


def test_the_weight_of_a_row_is_that_of_its_tokens() -> None:
    row = np.array([0.5, 2.0, 0.0], "float32")
    expected = trained(LABELS, np.repeat(row[:, None], TIME, axis=1))
    assert_same(trained(LABELS, row), expected)
    assert_same(trained(LABELS, row[:, None]), expected)
    # As many columns as rows, so that the weights could be taken for the columns'.
    square = make_model().train_on_batch({"token_ids": IDS[:, :BATCH]}, LABELS[:, :BATCH], row)
    weights = np.repeat(row[:, None], BATCH, axis=1)
    again = make_model().train_on_batch({"token_ids": IDS[:, :BATCH]}, LABELS[:, :BATCH], weights)
    assert float(square) == pytest.approx(float(again), abs=1e-6)


@pytest.mark.parametrize("wrong", [VOCABULARY, 10**6])
def test_a_label_beyond_the_vocabulary(wrong: int) -> None:
    labels = LABELS.copy()
    labels[1, 3] = wrong
    message = rf"`labels` of .*below the `vocabulary_size` of {VOCABULARY}, received {wrong}"
    for call in (
        lambda: make_model().token_losses(IDS, labels),
        lambda: make_model().score(IDS, scoring_mode="loss", target_ids=labels),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    if helpers.BACKEND == "tensorflow":
        with pytest.raises(ValueError, match=message):
            trained(labels, jit_compile=False, run_eagerly=True)


@pytest.mark.long
def test_under_xla_too() -> None:
    model = make_model(jit_compile=True)
    losses = np.array(jitted(model.token_losses)(IDS, LABELS))
    before = model.get_weights()
    too_large = LABELS.copy()
    too_large[1, 3] = VOCABULARY
    assert np.isnan(model.train_on_batch({"token_ids": IDS}, too_large))
    of_labels = helpers.xla(lambda labels: model.token_losses(IDS, labels))
    known = np.array(of_labels(keras.ops.convert_to_tensor(too_large)))
    assert np.isnan(known[1, 3]) and np.isnan(known).sum() == 1
    np.testing.assert_allclose(np.where(np.isnan(known), losses, known), losses, rtol=1e-5)
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    model.reset_metrics()
    loss = model.train_on_batch({"token_ids": IDS}, np.where(MASK, LABELS, -100))
    assert float(loss) == pytest.approx(losses[MASK].mean(), abs=1e-5)


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_a_token_id_outside_of_the_vocabulary(wrong: int) -> None:
    model, ids = make_model(), IDS.copy()
    ids[2, 1] = wrong
    state = model.backbone.get_initial_state(BATCH)
    prompts = {"token_ids": ids, "padding_mask": np.ones_like(MASK)}
    for call in (
        lambda: model({"token_ids": ids}),
        lambda: model.backbone({"token_ids": ids}),
        lambda: model.token_losses(ids, LABELS),
        lambda: model.score(ids),
        lambda: model.prefill(ids),
        lambda: model.step(ids[:, 1], state),
        lambda: model.generate(prompts, stop_token_ids=None),
    ):
        with pytest.raises(ValueError, match=rf"`token_ids` of .*received {wrong}\."):
            call()


def test_inputs_of_other_names_are_refused() -> None:
    model = make_model()
    x = {"token_ids": IDS, "attention_mask": MASK}
    for call in (model, model.backbone, lambda x: model.train_on_batch(x, LABELS)):
        with pytest.raises(ValueError, match="received also attention_mask"):
            call(x)


@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_a_token_id_outside_of_the_vocabulary_in_fit(wrong: int) -> None:
    ids = IDS.copy()
    ids[1, 3] = wrong
    model = make_model()
    message = rf"`token_ids` of .*below the `vocabulary_size` of {VOCABULARY}, received {wrong}"
    for call in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=message):
            call({"token_ids": ids}, LABELS, verbose=0)
    with pytest.raises(ValueError, match=message):
        model.predict({"token_ids": ids}, verbose=0)


@pytest.mark.long
@pytest.mark.parametrize("wrong", [-1, VOCABULARY])
def test_a_token_id_outside_of_the_vocabulary_makes_the_loss_of_a_compiled_step_nan(
    wrong: int,
) -> None:
    ids = IDS.copy()
    ids[1, 3] = wrong
    assert np.isnan(make_model(jit_compile=True).train_on_batch({"token_ids": ids}, LABELS))


def test_arrays_that_do_not_fit_are_explained() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r'Pass ids as \{"token_ids": ids\}'):
        model.fit(IDS, LABELS, verbose=0)
    with pytest.raises(ValueError, match="labels"):
        model.fit({"token_ids": IDS}, LABELS[:, 1:], verbose=0)
