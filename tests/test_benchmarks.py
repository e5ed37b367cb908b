"""The benchmarks' literal baseline is what its equations say, and every script starts."""

import importlib.util
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tests.helpers import relative_error, tensorflow_only

FOLDER = Path(__file__).parent.parent / "benchmarks"
SCRIPTS = ("accelerator", "decode", "layer", "memory", "op", "peers", "train")

pytestmark = tensorflow_only


def load(name):
    """A benchmark as a module of its own name."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # NamedTuples and pickles look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        load(name).main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    smaller = "--device" if name == "accelerator" else "--short"
    assert f"python benchmarks/{name}.py" in printed and smaller in printed


def test_literal_baseline_equals_its_equations():
    baselines, harness = load("baselines"), load("harness")
    model = baselines.literal_elita(vocabulary_size=23, num_layers=2, hidden_dim=10, num_heads=5)
    # Some logits lie beyond the clip, so that it shows.
    harness.randomize(model, scale=3.0)
    token_ids = np.random.default_rng(0).integers(23, size=(2, 7))
    expected = baselines.literal_elita_logits(model, token_ids)
    assert relative_error(model({"token_ids": token_ids}), expected) < 3e-5


@pytest.mark.long
def test_decoders_go_on_from_their_state():
    before = keras.config.dtype_policy()
    try:
        assert load("decode").parity("elita") < 3e-5
    finally:
        keras.config.set_dtype_policy(before)


def test_parity_gate_refuses():
    harness = load("harness")
    for error in (1e-3, float("nan")):
        with pytest.raises(harness.ParityError, match="no figure"):
            harness.require_parity("case", error)
