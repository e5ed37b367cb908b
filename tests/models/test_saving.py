"""Files of models, and what they say of the model; copies, cards and quantization."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
import pytest

from elita_tf.models import (
    ElitaBackbone,
    ElitaCausalLM,
    ElitaCausalLMPreprocessor,
    architectures,
)
from tests.helpers import jitted, randomized, tensorflow_only

SIZES = {"hidden_dim": 8, "num_heads": 2, "num_layers": 2, "context_length": 6}
IDS = np.arange(14).reshape(2, 7) % 11


def make_model(
    architecture: str = "elita_gated", preprocessor: Any = None, seed: int = 11, **changes: Any
) -> ElitaCausalLM:
    vocabulary = preprocessor.tokenizer.vocabulary_size() if preprocessor else 11
    backbone = ElitaBackbone(vocabulary, **{**architectures[architecture], **SIZES, **changes})
    return randomized(ElitaCausalLM(backbone, preprocessor), scale=0.4, seed=seed)


def logits_of(model: ElitaCausalLM) -> np.ndarray:
    return np.array(jitted(model)({"token_ids": IDS}), "float32")


# === Weights ===
OTHERS = {
    "fewer blocks": {"num_layers": 1},
    "more blocks": {"num_layers": 3},
    "another length": {"context_length": 7},
    "another mixer": {"mixers": "attention2_query"},
    "other options": {"feed_forward_options": {"activation": "relu"}},
    "another window": {"window_length": 3},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a model and of its backbone, the whole model, and a preset."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_model("elita")
    model.save_weights(folder / "model.weights.h5")
    model.backbone.save_weights(folder / "backbone.weights.h5")
    model.save_to_preset(folder / "preset")
    return folder


@pytest.mark.every_case
@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_weights_of_another_backbone_are_refused_by_name(saved: Path, changes: dict) -> None:
    other = make_model("elita", seed=5, **changes)
    before = other.get_weights()
    for model, file in ((other, "model"), (other.backbone, "backbone")):
        with pytest.raises(ValueError, match=next(iter(changes))):
            model.load_weights(saved / f"{file}.weights.h5")
    for weight, kept in zip(other.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, kept)


def test_a_preset_with_the_weights_of_another_is_refused(saved: Path, tmp_path: Path) -> None:
    make_model("elita", num_layers=1, seed=5).save_to_preset(tmp_path)
    (tmp_path / "model.weights.h5").write_bytes(
        (saved / "preset" / "model.weights.h5").read_bytes()
    )
    for cls in (ElitaBackbone, ElitaCausalLM):
        with pytest.raises(ValueError, match="num_layers=2.* has num_layers=1"):
            cls.from_preset(str(tmp_path))


def test_weights_load_under_another_name_dropout_and_dtype(saved: Path) -> None:
    free = {"name": "other", "dropout": 0.1, "window_length": 6, "dtype": "float64"}
    model = make_model("elita", seed=5, **free)
    model.load_weights(saved / "model.weights.h5")
    for weight, expected in zip(
        model.get_weights(), make_model("elita").get_weights(), strict=True
    ):
        np.testing.assert_array_equal(weight.astype("float32"), expected)


# === Dtype policies ===
@pytest.mark.every_case
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16", "float64"])
def test_a_preset_comes_back_in_its_dtype_policy(dtype: str, tmp_path: Path) -> None:
    model = make_model(dtype=dtype, num_layers=1)
    model.save_to_preset(tmp_path)
    loaded = ElitaCausalLM.from_preset(str(tmp_path))
    backbone = ElitaBackbone.from_preset(str(tmp_path))
    of_keras_hub = keras_hub.models.CausalLM.from_preset(str(tmp_path))
    for each in (loaded, of_keras_hub, backbone, backbone.blocks[0].mixer.layer):
        assert each.dtype_policy.name == dtype
    np.testing.assert_array_equal(logits_of(loaded), logits_of(model))
    assert ElitaBackbone.from_config(backbone.get_config()).dtype_policy.name == dtype
    float32 = ElitaBackbone.from_preset(str(tmp_path), dtype="float32")
    assert {weight.dtype for weight in float32.weights} == {"float32"}


# === Copies ===
@pytest.fixture(scope="module")
def sampling_model() -> ElitaCausalLM:
    model = make_model(num_layers=1)
    model.compile(sampler=keras_hub.samplers.TopPSampler(p=0.3, temperature=0.5, seed=7))
    return model


@pytest.mark.every_case
@pytest.mark.parametrize("way", ["keras", "pickle", "deepcopy"])
def test_a_copy_keeps_the_sampler(sampling_model: ElitaCausalLM, way: str, tmp_path: Path) -> None:
    if way == "keras":
        sampling_model.save(tmp_path / "model.keras")
        copied = keras.models.load_model(tmp_path / "model.keras")
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(sampling_model))
    else:
        copied = copy.deepcopy(sampling_model)
    assert isinstance(copied, ElitaCausalLM)
    assert copied.sampler.get_config() == sampling_model.sampler.get_config()
    np.testing.assert_array_equal(logits_of(copied), logits_of(sampling_model))


def test_clone_model_is_refused_and_its_message_helps(sampling_model: ElitaCausalLM) -> None:
    for model in (sampling_model, sampling_model.backbone):
        with pytest.raises(ValueError, match=r"from_config\(model.get_config\(\)\)"):
            keras.models.clone_model(model)
    fresh = ElitaCausalLM.from_config(sampling_model.get_config())
    assert fresh.backbone.get_config() == sampling_model.backbone.get_config()
    # As a layer of another model it is cloned as what it is.
    inputs = keras.Input((None,), dtype="int32", name="token_ids")
    optional = {name: x for name, x in fresh.backbone.input.items() if name != "token_ids"}
    outer = keras.Model(
        {"token_ids": inputs, **optional},
        fresh.backbone({"token_ids": inputs, **optional}),
    )
    assert ElitaBackbone in map(type, keras.models.clone_model(outer).layers)


@pytest.mark.parametrize("file_format", ["onnx", "litert", "openvino"])
def test_formats_that_keras_would_write_in_vain(
    sampling_model: ElitaCausalLM, file_format: str, tmp_path: Path
) -> None:
    for model in (sampling_model, sampling_model.backbone):
        with pytest.raises(ValueError, match="export_onnx or export_litert"):
            model.export(tmp_path / "model", format=file_format)
    assert not list(tmp_path.iterdir())


# === Quantization ===
def test_a_quantized_model_of_text_generates_trains_and_loads(
    tokenizers: dict, tmp_path: Path
) -> None:
    preprocessor = ElitaCausalLMPreprocessor(tokenizers["lossless"], sequence_length=8)
    exact = make_model(preprocessor=preprocessor, num_layers=1, dtype="mixed_bfloat16")
    exact.save_to_preset(tmp_path / "exact")
    model = ElitaCausalLM.from_preset(str(tmp_path / "exact"))
    model.compile(sampler="greedy", jit_compile=False)
    model.quantize("int8")
    assert model.backbone.token_embedding.quantization_mode == "int8"
    assert model.preprocessor.tokenizer.quantization_mode is None
    model.save_to_preset(tmp_path / "quantized")
    loaded = ElitaCausalLM.from_preset(str(tmp_path / "quantized"))
    np.testing.assert_array_equal(logits_of(loaded), logits_of(model))
    policies = [
        {x.path: (x.compute_dtype, x.quantization_mode) for x in each.backbone._flatten_layers()}
        for each in (model, loaded)
    ]
    assert policies[0] == policies[1]
    assert ("bfloat16", "int8") in policies[0].values()
    assert ElitaBackbone.from_preset(str(tmp_path / "quantized")).compute_dtype == "bfloat16"
    with pytest.raises(ValueError, match="quantized.* Leave out `dtype`"):
        ElitaCausalLM.from_preset(str(tmp_path / "quantized"), dtype="float32")
    with pytest.raises(ValueError, match="quantized=True"):
        exact.backbone.load_weights(tmp_path / "quantized" / "model.weights.h5")


def test_what_cannot_be_saved_is_not_quantized(sampling_model: ElitaCausalLM) -> None:
    before = [layer.dtype_policy.name for layer in sampling_model._flatten_layers()]
    for model in (sampling_model, sampling_model.backbone):
        for arguments in (
            {"mode": "int4"},
            {"config": keras.quantizers.Int4QuantizationConfig()},
            {"mode": "awq", "config": keras.quantizers.AWQConfig(dataset=["a"], tokenizer=str)},
        ):
            with pytest.raises(ValueError, match="expected one of .*int8"):
                model.quantize(**arguments)
    assert [layer.dtype_policy.name for layer in sampling_model._flatten_layers()] == before


def test_quantization_and_lora_do_not_meet() -> None:
    model = make_model(num_layers=1)
    model.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="LoRA"):
        model.quantize("int8")
    assert model.backbone.token_embedding.quantization_mode is None
    model = make_model(num_layers=1)
    model.quantize("int8")
    with pytest.raises(ValueError, match="quantized"):
        model.backbone.enable_lora(2)
    with pytest.raises(ValueError, match="quantized already"):
        model.quantize("int8")
    assert model.backbone.trainable_weights


# === The card ===
def front_matter(folder: Path) -> dict[str, Any]:
    """The first lines of a card, read by hand: keys with a value or a list."""
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields: dict[str, Any] = {}
    for line in head.splitlines():
        if line.startswith("- "):
            fields[list(fields)[-1]] = [*fields[list(fields)[-1]], line[2:]]
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return {**fields, "text": text}


def test_a_preset_has_a_card(tmp_path: Path) -> None:
    model = make_model("elita", num_layers=1)
    model.save_to_preset(tmp_path / "mine", license="cc-by-sa-3.0", datasets=["me/texts"])
    card = front_matter(tmp_path / "mine")
    assert card["library_name"] == "keras-hub" and card["pipeline_tag"] == "text-generation"
    assert card["license"] == "cc-by-sa-3.0" and card["datasets"] == ["me/texts"]
    assert "elita_tf" in card["tags"] and "# mine" in card["text"]
    assert f"{model.count_params():,} parameters" in card["text"]
    make_model("gla", num_layers=1).save_to_preset(tmp_path / "mine")
    card = front_matter(tmp_path / "mine")
    assert card["license"] == "unknown" and "datasets" not in card and "gla" in card["text"]
    (tmp_path / "mine" / "README.md").write_text("My own words.")
    model.save_to_preset(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "My own words."
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["config"]["num_layers"] == 1


def test_a_preset_is_uploaded_with_its_card(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/guides/exports.md has it: the card first, as KerasHub writes one where none is."""
    from keras_hub.src.utils import preset_utils

    uploaded = {}

    class Hub:
        def create_repo(self, repo_id: str, exist_ok: bool) -> Any:
            return type("Address", (), {"repo_id": repo_id})

        def file_exists(self, repo_id: str, filename: str) -> bool:
            return filename == "README.md"

        def upload_folder(self, repo_id: str, folder_path: str) -> None:
            files = sorted(path.name for path in Path(folder_path).iterdir())
            uploaded[repo_id] = files

    monkeypatch.setattr(preset_utils, "huggingface_hub", Hub())
    card = (saved / "preset" / "README.md").read_bytes()
    keras_hub.upload_preset("hf://me/model", str(saved / "preset"))
    expected = ["README.md", "config.json", "metadata.json", "model.weights.h5", "task.json"]
    assert uploaded == {"me/model": expected}
    assert (saved / "preset" / "README.md").read_bytes() == card


# === Keras' global switches ===
@tensorflow_only
def test_remat_scope_is_refused_by_naming_ours(sampling_model: ElitaCausalLM) -> None:
    with keras.RematScope(mode="full"):
        with pytest.raises(ValueError, match="rematerialize=True"):
            make_model()
        with pytest.raises(ValueError, match="rematerialize=True"):
            sampling_model.fit({"token_ids": IDS}, IDS, verbose=0)
