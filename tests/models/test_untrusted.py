"""Files from strangers: loading a `.keras` file or a preset runs nothing of theirs.

Every hostile file would write `executed`, or a file outside of its folder, if it were trusted.
"""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

from elita_tf import layers
from tests.hostile import Payload, hostile_objects, rewrite

WIDTH = 4


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "executed"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A `.keras` file with a layer of this package."""
    inputs = keras.Input((None, WIDTH))
    path = tmp_path / "small.keras"
    keras.Model(inputs, layers.FeedForward2(rank=2)(inputs)).save(path)
    return path


def with_config(path: Path, change: Callable[[dict], None]) -> Path:
    def change_entry(entries: dict[str, bytes]) -> None:
        config = json.loads(entries["config.json"])
        change(config)
        entries["config.json"] = json.dumps(config).encode()

    return rewrite(path, change_entry)


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
