"""Files from strangers: loading a `.keras` file or a preset runs nothing of theirs.

Every hostile file would write `executed`, or a file outside of its folder, if it were trusted.
"""

import contextlib
import io
import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from elita_tf import layers
from elita_tf.models import ElitaBackbone, ElitaCausalLM, ElitaCausalLMPreprocessor, architectures

WIDTH = 4
MARK = "executed"


class Payload:
    """Writes the mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / MARK


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A `.keras` file with a layer of this package."""
    inputs = keras.Input((None, WIDTH))
    path = tmp_path / "small.keras"
    keras.Model(inputs, layers.FeedForward2(rank=2)(inputs)).save(path)
    return path


@pytest.fixture(scope="module")
def preset_of_text(tokenizers: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset and, beside it, the same model as `text.keras`, tokenizer included."""
    folder = tmp_path_factory.mktemp("text")
    _, tokenizer = tokenizers["lossless"]
    arguments = {**architectures["gla"], "num_layers": 1, "hidden_dim": 8, "num_heads": 2}
    backbone = ElitaBackbone(tokenizer.vocabulary_size(), **arguments)
    model = ElitaCausalLM(backbone, ElitaCausalLMPreprocessor(tokenizer, 16))
    model.save_to_preset(str(folder / "preset"))
    model.save(folder / "text.keras")
    return folder


@pytest.fixture
def preset(preset_of_text: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(preset_of_text / "preset", tmp_path / "preset"))


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with its entries changed, under the same name."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def with_config(path: Path, change: Callable[[dict], None]) -> Path:
    def change_entry(entries: dict[str, bytes]) -> None:
        config = json.loads(entries["config.json"])
        change(config)
        entries["config.json"] = json.dumps(config).encode()

    return rewrite(path, change_entry)


def hostile_objects(mark: Path) -> list[dict[str, Any]]:
    """What Keras' format could name instead of an activation, an initializer or a layer."""
    command = f"touch {mark}"
    names = [
        ("os", "system"),
        ("builtins", "eval"),
        ("subprocess", "run"),
        ("keras.utils", "get_file"),
    ]
    found = []
    for module, name in names:
        found.append({"module": module, "class_name": name, "config": {"command": command}})
        found.append({"module": module, "class_name": "function", "config": name})
        found[-1]["registered_name"] = name
    marshalled = {"value": ["4wAAAAA=", None, None]}
    found.append({"class_name": "__lambda__", "config": marshalled, "module": "builtins"})
    return found


PLACES = {
    "activation": lambda config: config["config"]["layers"][1]["config"],
    "kernel_initializer": lambda config: config["config"]["layers"][1]["config"],
    "kernel_regularizer": lambda config: config["config"]["layers"][1]["config"],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", range(9))
def test_a_config_that_names_other_code(small: Path, mark: Path, place: str, number: int) -> None:
    hostile = hostile_objects(mark)[number]
    path = with_config(small, lambda config: PLACES[place](config).update({place: hostile}))
    with pytest.raises((ValueError, TypeError)):
        keras.models.load_model(path)
    assert not mark.exists()


@pytest.mark.parametrize("number", range(9))
def test_a_layer_or_a_model_that_is_other_code(small: Path, mark: Path, number: int) -> None:
    hostile = hostile_objects(mark)[number]
    content = small.read_bytes()
    for change in (
        lambda config: config["config"]["layers"].__setitem__(1, {**hostile, "name": "x"}),
        lambda config: (config.clear(), config.update(hostile)),
        lambda config: config.update(compile_config={"optimizer": hostile, "loss": hostile}),
        lambda config: config.update(build_config=hostile, **hostile),
    ):
        small.write_bytes(content)
        with pytest.raises((ValueError, TypeError, KeyError)):
            keras.models.load_model(with_config(small, change))
        assert not mark.exists()
    with pytest.raises((ValueError, TypeError)):
        layers.Streaming.from_config({"layer": hostile})
    assert not mark.exists()


def test_a_lambda_layer(tmp_path: Path, mark: Path) -> None:
    inputs = keras.Input((WIDTH,))
    touch = keras.layers.Lambda(
        lambda x, mark: (__import__("pathlib").Path(mark).touch(), x)[1],
        arguments={"mark": str(mark)},
    )
    keras.Model(inputs, touch(inputs)).save(tmp_path / "lambda.keras")
    mark.unlink()
    keras.models.load_model(tmp_path / "lambda.keras", safe_mode=False)
    assert mark.exists()  # The payload works where it is trusted.
    mark.unlink()
    with pytest.raises(ValueError, match="lambda"):
        keras.models.load_model(tmp_path / "lambda.keras")
    assert not mark.exists()


def test_pickled_weights(small: Path, mark: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, weights=np.array([Payload(mark)], dtype=object))
    np.load(io.BytesIO(buffer.getvalue()), allow_pickle=True)["weights"]
    assert mark.exists()  # The payload works where it is trusted.
    mark.unlink()
    pickled = pickle.dumps(Payload(mark))
    content = small.read_bytes()
    for name, weights in (
        ("model.weights.npz", buffer.getvalue()),
        ("model.weights.h5", pickled),
        ("model.weights.h5", buffer.getvalue()),
    ):
        small.write_bytes(content)
        rewrite(small, lambda entries: entries.pop("model.weights.h5"))  # noqa: B023
        rewrite(small, lambda entries: entries.update({name: weights}))  # noqa: B023
        with pytest.raises((ValueError, OSError, KeyError)):
            keras.models.load_model(small)
        assert not mark.exists()


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
    for hostile in hostile_objects(mark):
        (preset / name).write_text(whole, encoding="utf-8")
        change_json(
            preset / name,
            lambda content, hostile=hostile: content.update({"registered_name": "x", **hostile}),
        )
        with pytest.raises((ValueError, TypeError, AttributeError)):
            load(str(preset))
        (preset / name).write_text(whole, encoding="utf-8")
        change_json(
            preset / name, lambda content, hostile=hostile: content["config"].update(dtype=hostile)
        )
        # Not read where the dtype of Keras' own policy is taken.
        with contextlib.suppress(ValueError, TypeError, AttributeError):
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
