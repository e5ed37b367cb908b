"""Presets and whole models from strangers: loading them runs nothing of theirs."""

import contextlib
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM, ElitaCausalLMPreprocessor, architectures
from tests.hostile import Payload, hostile_objects, rewrite


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture(scope="module")
def preset_of_text(tokenizers: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset and, beside it, the same model as `text.keras`, tokenizer included."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = tokenizers["lossless"]
    arguments = {**architectures["gla"], "num_layers": 1, "hidden_dim": 8, "num_heads": 2}
    backbone = ElitaBackbone(tokenizer.vocabulary_size(), **arguments)
    model = ElitaCausalLM(backbone, ElitaCausalLMPreprocessor(tokenizer, 16))
    model.save_to_preset(str(folder / "preset"))
    model.save(folder / "text.keras")
    return folder


@pytest.fixture
def preset(preset_of_text: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(preset_of_text / "preset", tmp_path / "preset"))


@pytest.mark.parametrize("name", ["../evil", "assets/../../evil", "/{folder}/evil", "..\\evil"])
def test_an_archive_that_writes_elsewhere(
    preset_of_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = tmp_path / "model" / "text.keras"
    path.parent.mkdir()
    shutil.copy(preset_of_text / "text.keras", path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    rewrite(path, lambda entries: entries.update({name.format(folder=tmp_path): b"evil"}))
    try:
        loaded = keras.models.load_model(path)
    except (ValueError, OSError):
        loaded = None
    assert loaded is None or isinstance(loaded, ElitaCausalLM)
    assert not list(tmp_path.rglob("*evil*"))


# What Keras and KerasHub refuse with.
REFUSED = (ValueError, TypeError, AttributeError)


def change_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["config.json", "task.json", "tokenizer.json", "preprocessor.json"]
)
def test_a_preset_that_names_other_code(preset: Path, mark: Path, name: str) -> None:
    whole = (preset / name).read_text(encoding="utf-8")
    load = {
        "config.json": ElitaBackbone.from_preset,
        "task.json": ElitaCausalLM.from_preset,
        "tokenizer.json": ElitaCausalLMPreprocessor.tokenizer_cls.from_preset,
        "preprocessor.json": ElitaCausalLMPreprocessor.from_preset,
    }[name]
    for number, hostile in enumerate(hostile_objects(mark)):
        changes: list[Callable[[dict], None]] = [
            lambda content, hostile=hostile: content.update({"registered_name": "x", **hostile})
        ]
        if number % 4 == 0:  # Loads where the dtype of Keras' own policy is taken instead.
            changes.append(lambda content, hostile=hostile: content["config"].update(dtype=hostile))
        for change in changes:
            (preset / name).write_text(whole, encoding="utf-8")
            change_json(preset / name, change)
            refused = pytest.raises(REFUSED)
            with refused if change is changes[0] else contextlib.suppress(*REFUSED):
                load(str(preset))
            assert not mark.exists()


def test_weights_of_a_preset_that_are_none_or_lie_elsewhere(preset: Path, mark: Path) -> None:
    weights = preset / "model.weights.h5"
    secret = preset.parent / "secret.h5"
    shutil.copy(weights, secret)
    with h5py.File(weights, "a") as file:
        (group,) = [name for name in file["layers"] if "embedding" in name]
        del file["layers"][group]
        file["layers"][group] = h5py.ExternalLink(str(secret), f"/layers/{group}")
    with pytest.raises(ValueError, match="[Nn]ot allowed|[Ll]ink"):
        ElitaBackbone.from_preset(str(preset))
    for content in (pickle.dumps(Payload(mark)), b"", secret.read_bytes()[:1000]):
        weights.write_bytes(content)
        with pytest.raises((ValueError, OSError)):
            ElitaBackbone.from_preset(str(preset))
        assert not mark.exists()


def test_a_shard_outside_of_the_preset(preset: Path) -> None:
    weights = preset / "model.weights.h5"
    shutil.move(weights, preset.parent / "model_00000.weights.h5")
    index = {"metadata": {}, "weight_map": {"/layers": "../model_00000.weights.h5"}}
    (preset / "model.weights.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises((ValueError, OSError, KeyError)):
        ElitaBackbone.from_preset(str(preset))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_tokenizer_of_a_preset_that_was_cut_short(preset: Path, keep: float) -> None:
    (path,) = preset.rglob("*.spm")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError):
        ElitaCausalLM.from_preset(str(preset))
