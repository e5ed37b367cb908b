"""What can be mistyped in making and calling a model is a ValueError: received, expected, fix."""

from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.models import (
    ElitaBackbone,
    ElitaCausalLM,
    architectures,
    export_litert,
    export_onnx,
    export_saved_model,
    load_gpt2_embeddings,
)
from elita_tf.schedules import CappedInverseSqrt
from tests.helpers import QUICKEST, jitted

VOCABULARY, BATCH, TIME = 20, 2, 5
IDS = np.arange(BATCH * TIME, dtype="int32").reshape(BATCH, TIME)
INPUTS = {"token_ids": IDS}


def make_backbone(**changes: Any) -> ElitaBackbone:
    arguments = {**architectures["hybrid"], "hidden_dim": 24, "num_heads": 3, "context_length": 8}
    return ElitaBackbone(**{"vocabulary_size": VOCABULARY, **arguments, **changes})


@pytest.fixture(scope="module")
def backbone() -> ElitaBackbone:
    return make_backbone()


@pytest.fixture(scope="module")
def model(backbone: ElitaBackbone) -> ElitaCausalLM:
    return ElitaCausalLM(backbone)


def fit(inputs: Any, labels: Any = None, carried_batch_size: int | None = None) -> None:
    """`fit` of a new model: on JAX, Keras loses the weights if the first step fails."""
    model = ElitaCausalLM(make_backbone(), carried_batch_size=carried_batch_size)
    model.compile(run_eagerly=not QUICKEST, jit_compile=QUICKEST)
    model.fit(inputs, labels, batch_size=BATCH, verbose=0)


SIZES = ("vocabulary_size", "num_layers", "hidden_dim", "num_heads", "context_length")
BAD = [(name, value) for name in SIZES for value in (0, -1, 2.5, "3", None, True)]
BAD += [("window_length", value) for value in (0, -1, 2.5, "3", True)]
BAD += [("dropout", value) for value in (-0.1, 1, 1.5, "a", None, float("nan"))]
BAD += [("mixers", value) for value in (None, 3, "rnn", ["gla"] * 2, [None] * 3, [["gla"]] * 3, [])]
BAD += [("feed_forward", value) for value in (None, "mlp", ["swiglu"], 3)]
BAD += [("normalization", value) for value in (None, "batch_norm", {})]
BAD += [("tie_embeddings", "no"), ("learned_positions", 1)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_an_argument_of_the_backbone(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` of ElitaBackbone.*expected.*received"):
        make_backbone(**{name: value})


def test_a_context_of_no_position_is_refused_also_where_no_block_needs_it() -> None:
    with pytest.raises(ValueError, match="`context_length` of ElitaBackbone.*received 0"):
        make_backbone(mixers="gla", context_length=0)


@pytest.mark.parametrize(("misspelt", "meant"), [("num_layer", "num_layers"), ("nam", "name")])
def test_a_misspelt_argument_of_the_backbone(misspelt: str, meant: str) -> None:
    message = f"ElitaBackbone has no argument `{misspelt}`.*did you mean `{meant}`"
    with pytest.raises(ValueError, match=message):
        make_backbone(**{misspelt: 7})


@pytest.mark.parametrize(
    ("misspelt", "meant"), [("rematerialise", "rematerialize"), ("compiled", "compile")]
)
def test_a_misspelt_argument_of_the_model(
    backbone: ElitaBackbone, misspelt: str, meant: str
) -> None:
    message = f"ElitaCausalLM has no argument `{misspelt}`.*did you mean `{meant}`"
    with pytest.raises(ValueError, match=message):
        ElitaCausalLM(backbone, **{misspelt: True})


def test_the_arguments_of_keras_are_taken() -> None:
    backbone = make_backbone(name="a", trainable=False, dtype="bfloat16")
    model = ElitaCausalLM(backbone, name="b", trainable=False, compile=False)
    assert (backbone.name, model.name, model.compiled) == ("a", "b", False)
    assert not backbone.trainable_variables and not model.trainable_variables


@pytest.mark.parametrize(
    "inputs",
    [IDS, {"tokens": IDS}, ["a text"], None, {"token_ids": IDS[0]}, {"token_ids": IDS[..., None]}],
    ids=["array", "another key", "strings", "None", "rank 1", "rank 3"],
)
def test_inputs_that_are_none(model: ElitaCausalLM, inputs: Any) -> None:
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
    rows = BATCH if first is None else len(first)
    # The last is Keras' own message for None, where KerasHub reads data by the package grain.
    message = r"takes a dict of `token_ids`|received token_ids \(|must have a batch dimension"
    for call in (
        model.backbone,
        model,
        lambda x: model.backbone.call_with_state(x, model.backbone.get_initial_state(BATCH)),
        lambda x: fit(x, np.resize(IDS, (rows, TIME))),
    ):
        if call is not model.backbone and isinstance(inputs, dict) and "tokens" in inputs:
            continue  # Keras names the missing input itself.
        with pytest.raises(ValueError, match=message):
            call(inputs)


@pytest.mark.parametrize("shape", [(BATCH, TIME - 1), (BATCH,), (1, TIME), (BATCH, TIME, 1)])
def test_a_padding_mask_of_another_shape(model: ElitaCausalLM, shape: tuple) -> None:
    mask = np.ones(shape, "bool")
    for call in (model.backbone, model, lambda x: model.prefill(**x)):
        with pytest.raises(ValueError, match=r"padding_mask .*expected token_ids \(batch, time\)"):
            call({"token_ids": IDS, "padding_mask": mask})


def test_a_state_that_does_not_fit(model: ElitaCausalLM) -> None:
    backbone = model.backbone
    good = backbone.get_initial_state(BATCH)
    for call in (
        lambda state: backbone.call_with_state(INPUTS, state),
        lambda state: model.step(IDS[:, 0], state),
    ):
        for state in (backbone.get_initial_state(1), backbone.get_initial_state(BATCH + 1)):
            with pytest.raises(ValueError, match=r"state .*: expected inputs \(batch, time, 24\)"):
                jitted(partial(call, state))()
        for state in ({}, None, {**good, "more": 1}, list(good)):
            with pytest.raises(ValueError, match="state.*get_initial_state"):
                jitted(partial(call, state))()


def test_token_ids_of_a_step_and_of_a_prompt(model: ElitaCausalLM) -> None:
    state = model.backbone.get_initial_state(BATCH)
    for token_ids in (IDS, IDS[0, 0], 3, None):
        with pytest.raises(ValueError, match=r"received token_ids .*expected token_ids \(batch\)"):
            model.step(token_ids, state)
    for token_ids in (IDS[0], IDS[..., None], IDS[:, :0], None):
        for call in (model.prefill, model.score):
            with pytest.raises(ValueError, match=r"expected token_ids \(batch, time\)"):
                call(token_ids)


def test_labels_that_do_not_fit(model: ElitaCausalLM) -> None:
    for labels in (IDS[:, :3], IDS[..., None], np.ones((BATCH, TIME, VOCABULARY))):
        for call in (
            lambda y: fit(INPUTS, y),
            lambda y: model.token_losses(IDS, y),
            lambda y: model.score(IDS, scoring_mode="loss", target_ids=y),
        ):
            with pytest.raises(ValueError, match=r"received .*, (labels|target_ids) \(2"):
                call(labels)
    with pytest.raises(ValueError, match="labels of type NoneType"):
        fit(INPUTS)


def test_a_batch_of_another_size_than_the_carried_state() -> None:
    with pytest.raises(ValueError, match=r"batch of 2 rows.*`carried_batch_size`=3"):
        fit(INPUTS, IDS, carried_batch_size=BATCH + 1)


def test_the_parts_of_a_model(backbone: ElitaBackbone) -> None:
    for wrong in (None, 3, keras.layers.Dense(3)):
        with pytest.raises(ValueError, match="ElitaBackbone.*received"):
            ElitaCausalLM(wrong)
        with pytest.raises(ValueError, match="ElitaBackbone.*received"):
            load_gpt2_embeddings(wrong)
    with pytest.raises(ValueError, match="`preprocessor` of ElitaCausalLM.*received 3"):
        ElitaCausalLM(backbone, preprocessor=3)
    with pytest.raises(ValueError, match="`rematerialize`.*'yes'"):
        ElitaCausalLM(backbone, rematerialize="yes")
    for size in (0, -1, "2"):
        with pytest.raises(ValueError, match=rf"`batch_size` of CarriedState.*{size!r}"):
            ElitaCausalLM(backbone, carried_batch_size=size)


@pytest.mark.parametrize("export", [export_saved_model, export_litert, export_onnx])
def test_an_export_of_no_model_writes_nothing(export: Any, tmp_path: Path, model: Any) -> None:
    with pytest.raises(ValueError, match="ElitaCausalLM to export; received 3"):
        export(3, tmp_path / "out")
    if export is not export_saved_model:
        with pytest.raises(ValueError, match="`batch_size`.*received 0"):
            export(model, tmp_path / "out", batch_size=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [0, -1, "a", None, float("nan")])
def test_a_learning_rate_is_above_0(value: Any) -> None:
    for name in ("peak", "scale"):
        with pytest.raises(ValueError, match=rf"{name}={value!r}"):
            CappedInverseSqrt(**{name: value})
