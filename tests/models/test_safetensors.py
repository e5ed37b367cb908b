"""The safetensors file, read with NumPy alone."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures, export_safetensors
from tests.helpers import jitted, randomized

DTYPES = {"F32": "<f4", "F64": "<f8", "I8": "<i1", "BF16": ml_dtypes.bfloat16}
IDS = np.arange(14).reshape(2, 7) % 11


def make_model(name: str, dtype: str = "float32") -> ElitaCausalLM:
    sizes = {"hidden_dim": 8, "num_heads": 2, "num_layers": 1, "context_length": 6}
    # Dropout has random seeds, which are no weights.
    arguments = {**architectures[name], **sizes, "dropout": 0.1}
    backbone = ElitaBackbone(11, **arguments, dtype=dtype)
    return randomized(ElitaCausalLM(backbone), scale=0.4)


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors, by the description of the format."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata, tensors, end = header.pop("__metadata__"), {}, 0
    assert all(isinstance(value, str) for value in metadata.values())
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        assert begin == end  # the format allows no gaps
        end = stop
        array = np.frombuffer(numbers[begin:stop], DTYPES[entry["dtype"]])
        tensors[name] = array.reshape(entry["shape"])
    assert end == len(numbers)
    return metadata, tensors


@pytest.mark.parametrize("name", ["elita_gated", "gla", "transformer"])
def test_a_fresh_model_takes_the_tensors_by_name(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    export_safetensors(model, tmp_path / "model.safetensors")
    metadata, tensors = read(tmp_path / "model.safetensors")
    config = json.loads(metadata["config"])
    assert config.pop("package") == "elita_tf"
    backbone = ElitaBackbone.from_config(config)
    assert tensors.keys() == {variable.path for variable in backbone.weights}
    for variable in backbone.weights:
        variable.assign(tensors[variable.path])
    logits = [np.array(jitted(x)({"token_ids": IDS})) for x in (model, ElitaCausalLM(backbone))]
    np.testing.assert_array_equal(logits[0], logits[1])


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_other_numbers_keep_their_dtype(kind: str, tmp_path: Path) -> None:
    model = make_model("elita_gated", "bfloat16" if kind == "bfloat16" else "float32")
    if kind == "int8":
        model.quantize(kind)
    export_safetensors(model, tmp_path / "model.safetensors")
    _, tensors = read(tmp_path / "model.safetensors")
    for variable in model.backbone.weights:
        array: Any = np.asarray(variable.value)
        assert tensors[variable.path].dtype == array.dtype
        np.testing.assert_array_equal(tensors[variable.path], array)
    assert kind in {array.dtype.name for array in tensors.values()}


def test_it_replaces_itself_and_nothing_else(tmp_path: Path) -> None:
    model, path = make_model("gla"), tmp_path / "deep" / "model.safetensors"
    for _ in range(2):
        export_safetensors(model, path)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    other = tmp_path / "other"
    other.write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(ValueError, match="exists and is not a safetensors file"):
        export_safetensors(model, other)
    assert other.read_bytes()[8:10] == b"{}"
    with pytest.raises(ValueError, match="Expected an ElitaCausalLM"):
        export_safetensors(model.backbone, tmp_path / "new")
