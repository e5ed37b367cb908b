"""Programs that all blocks of a kind share: the same training as in one program, compiled once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM
from tests import helpers
from tests.helpers import randomized

pytestmark = helpers.tensorflow_only
tf = pytest.importorskip("tensorflow")

VOCABULARY, BATCH, TIME = 23, 4, 11
RNG = np.random.default_rng(0)
IDS, LABELS = RNG.integers(0, VOCABULARY, (2, BATCH, TIME)).astype("int32")
WEIGHTS = RNG.random((BATCH, TIME)).astype("float32")
INPUTS = {
    "token_ids": IDS,
    "padding_mask": np.arange(TIME) < np.array([[TIME], [4], [7], [1]]),
    "segment_ids": np.sort(RNG.integers(0, 3, (BATCH, TIME)).astype("int32")),
}


@pytest.fixture
def without_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs as plain graphs: what is shared is the same, and XLA takes a minute for a model."""
    function = tf.function
    monkeypatch.setattr(
        tf, "function", lambda run, **options: function(run, **{**options, "jit_compile": False})
    )


def make_model(mixers: Sequence[str] = ("gla", "softmax", "gla"), **kwargs: Any) -> ElitaCausalLM:
    keras.utils.set_random_seed(3)
    sizes = {"hidden_dim": 12, "num_heads": 3, "context_length": 8, "num_layers": len(mixers)}
    options = {name: kwargs.pop(name) for name in ("dropout", "dtype") if name in kwargs}
    backbone = ElitaBackbone(VOCABULARY, mixers=list(mixers), **sizes, **options)
    return ElitaCausalLM(randomized(backbone, scale=0.3), **kwargs)


def trained(jit_compile: bool | str, x: dict[str, Any], **kwargs: Any) -> Any:
    model = make_model(**kwargs)
    model.compile(keras.optimizers.SGD(0.1), jit_compile=jit_compile)
    return model, [model.train_on_batch(x, LABELS, WEIGHTS) for _ in range(2)]


def assert_same(received: Any, expected: Any, tolerance: float) -> None:
    (model, losses), (other, other_losses) = received, expected
    assert losses == pytest.approx(other_losses, rel=tolerance)
    for weight, other_weight in zip(model.weights, other.weights, strict=True):
        np.testing.assert_allclose(
            weight.numpy(), other_weight.numpy(), atol=tolerance, err_msg=weight.path
        )


@pytest.mark.long
@pytest.mark.usefixtures("without_xla")
@pytest.mark.parametrize("options", [{}, {"rematerialize": True, "dropout": 0.3}], ids=str)
def test_training_is_that_of_one_graph(options: dict) -> None:
    received, expected = (
        trained(jit_compile, INPUTS, dtype="float64", **options)
        for jit_compile in ("blocks", False)
    )
    assert_same(received, expected, 1e-12)


@pytest.mark.long
def test_under_xla_too() -> None:
    x = {"token_ids": IDS}
    received, expected = (trained(choice, x, mixers=["attention2"]) for choice in ("blocks", False))
    assert_same(received, expected, 2e-6)
    losses = [
        model.evaluate(x, LABELS, sample_weight=WEIGHTS, verbose=0)
        for model, _ in (received, expected)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.long
@pytest.mark.usefixtures("without_xla")
def test_mixed_precision_keeps_its_float32_islands() -> None:
    received, expected = (
        trained(choice, INPUTS, mixers=["gla"] * 2, dtype="mixed_bfloat16")
        for choice in ("blocks", False)
    )
    assert received[1] == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.long
@pytest.mark.usefixtures("without_xla")
def test_blocks_of_a_kind_share_a_program_and_others_do_not() -> None:
    model, _ = trained("blocks", INPUTS)
    # Two mixers, the feed-forward, the last norm and the loss: each traced once, for both blocks.
    shared = model._shared_compilation
    programs = [*shared._programs.values(), shared._cross_entropy]
    assert [p.experimental_get_tracing_count() for p in programs] == [1] * 5


@pytest.mark.long
@pytest.mark.usefixtures("without_xla")
def test_frozen_and_adapted_layers_are_of_another_kind() -> None:
    def after(jit_compile: bool | str) -> list[np.ndarray]:
        model = make_model(["gla"] * 2)
        blocks = model.backbone.blocks
        blocks[0].feed_forward.layer.trainable = False
        blocks[1].mixer.layer.query_projection.enable_lora(2)
        adapter = blocks[1].mixer.layer.query_projection.lora_kernel_b
        adapter.assign(np.ones(adapter.shape))
        model.compile(keras.optimizers.SGD(0.1), jit_compile=jit_compile)
        model.train_on_batch(INPUTS, LABELS, WEIGHTS)
        return model.get_weights()

    for received, expected in zip(after("blocks"), after(False), strict=True):
        np.testing.assert_allclose(received, expected, atol=2e-6)


@pytest.mark.parametrize(("num_layers", "by_blocks"), [(4, False), (5, True)])
def test_auto_takes_them_for_more_than_four_blocks(num_layers: int, by_blocks: bool) -> None:
    model = make_model(["softmax"] * num_layers)
    assert (
        model._shared_compilation is not None
    ) is by_blocks and model.jit_compile is not by_blocks
    model.compile(weighted_metrics=["accuracy"])
    assert model._shared_compilation is None and model.jit_compile is True
    model.compile(jit_compile=False)
    assert model._shared_compilation is None and model.jit_compile is False
    model.compile(run_eagerly=True)
    assert model._shared_compilation is None and model.jit_compile is False


@pytest.mark.long
@pytest.mark.usefixtures("without_xla")
def test_the_choice_is_saved(tmp_path: Path) -> None:
    model, _ = trained("blocks", INPUTS, mixers=["softmax"])
    model.save(tmp_path / "model.keras")
    reloaded = keras.models.load_model(tmp_path / "model.keras")
    received, expected = (m.train_on_batch(INPUTS, LABELS, WEIGHTS) for m in (reloaded, model))
    assert reloaded._shared_compilation is not None and received == pytest.approx(
        expected, rel=1e-6
    )
    assert reloaded.get_compile_config()["jit_compile"] == "blocks"


@pytest.mark.parametrize(
    "options",
    [{"loss": "mse"}, {"weighted_metrics": ["accuracy"]}, {"metrics": ["accuracy"]}]
    + [{"run_eagerly": True}],
    ids=str,
)
def test_blocks_need_the_default_loss_in_a_graph(options: dict) -> None:
    with pytest.raises(ValueError, match="jit_compile='blocks' is for TensorFlow on one device"):
        make_model(["gla"]).compile(jit_compile="blocks", **options)


def test_blocks_exclude_a_carried_state() -> None:
    model = make_model(["gla"], carried_batch_size=BATCH)
    with pytest.raises(ValueError, match="carried state"):
        model.compile(jit_compile="blocks")
