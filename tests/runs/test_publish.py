"""A run becomes a preset: half the bytes, nearly the same loss, a card that says so."""

import re
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest

from elita_tf.models import ElitaCausalLM
from elita_tf.runs import publish


@pytest.mark.long
def test_a_run_becomes_a_preset(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "NUM_WINDOWS", 3)
    publish.main(["--run_dir", str(run_dir), "--name", "tiny"])
    preset, tests = tmp_path / "elita_tf/presets/tiny", tmp_path / "tests/models/tiny"
    windows = np.load(tests / publish.WINDOWS_FILE)
    assert windows.shape == (3, 17) and windows.dtype == "uint16"
    np.testing.assert_array_equal(windows[:-1, -1], windows[1:, 0])
    with h5py.File(preset / "model.weights.h5") as file:
        kinds = set()
        file.visititems(lambda _, x: kinds.add(x.dtype) if isinstance(x, h5py.Dataset) else None)
    # The bytes are the names of the backbone's arguments.
    assert kinds == {np.dtype("float16"), np.dtype("uint8")}
    exact = ElitaCausalLM.from_preset(str(run_dir / "preset"))
    halved = ElitaCausalLM.from_preset(str(preset))
    assert {weight.dtype for weight in halved.weights} == {"float32"}
    for weight, rounded in zip(exact.weights, halved.weights, strict=True):
        weight, rounded = map(keras.ops.convert_to_numpy, (weight, rounded))
        np.testing.assert_array_equal(weight.astype("float16").astype("float32"), rounded)
    card = (preset / "README.md").read_text(encoding="utf-8")
    (figure,) = re.findall(r"preset: ([\d.]+) nats", card)
    assert publish.window_loss(halved, windows) == pytest.approx(float(figure), abs=5e-5)
    assert publish.window_loss(exact, windows) == pytest.approx(float(figure), rel=1e-2)
    for text in (card, (tests / "README.md").read_text(encoding="utf-8")):
        assert "CC BY-SA 3.0" in text and "Wikipedia" in text
