"""The trained model inside the package: it loads offline and loses what its card says."""

import re
from pathlib import Path

import numpy as np
import pytest

from elita_tf.models import (
    ElitaBackbone,
    ElitaCausalLM,
    ElitaCausalLMPreprocessor,
    ElitaTokenizer,
)
from elita_tf.models.model_card import front_matter
from elita_tf.packaged_presets import FOLDER, PRESETS
from tests.helpers import jitted

NAMES = pytest.mark.parametrize("name", PRESETS)

pytestmark = pytest.mark.usefixtures("without_int64")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))


def card_of(name: str) -> str:
    return (FOLDER / name / "README.md").read_text(encoding="utf-8")


@NAMES
def test_the_loss_on_validation_windows_is_that_of_the_card(name: str) -> None:
    model = ElitaCausalLM.from_preset(name)
    windows = np.load(Path(__file__).parent / name / "validation_windows.npy").astype("int32")
    assert windows.shape == (64, 257)
    losses = jitted(model.token_losses)(windows[:, :-1], windows[:, 1:])
    (figure,) = re.findall(r"preset: ([\d.]+) nats", card_of(name))
    assert float(np.mean(losses)) == pytest.approx(float(figure), abs=2e-4)
    assert model.count_params() == PRESETS[name]["metadata"]["params"]


@NAMES
def test_the_parts_load_by_name_and_write_a_text(name: str) -> None:
    assert name in ElitaCausalLM.presets
    backbone = ElitaBackbone.from_preset(name)
    tokenizer = ElitaTokenizer.from_preset(name)
    preprocessor = ElitaCausalLMPreprocessor.from_preset(name)
    assert preprocessor.tokenizer.vocabulary_size() == backbone.vocabulary_size
    assert tokenizer.detokenize(tokenizer("The game was played in 1998 .")).endswith("1998 .")
    model = ElitaCausalLM.from_preset(name)
    model.compile(sampler="greedy", jit_compile=False)
    text = model.generate("The", max_length=24)
    assert text.startswith("The") and len(set(text.split())) > 4


@NAMES
def test_the_package_stays_small_and_names_licences(name: str) -> None:
    sizes = [path.stat().st_size for path in (FOLDER / name).rglob("*") if path.is_file()]
    assert sum(sizes) < 1_000_000
    attribution = (Path(__file__).parent / name / "README.md").read_text(encoding="utf-8")
    assert card_of(name).startswith(front_matter("cc-by-sa-3.0", ["Salesforce/wikitext"]))
    for text in (card_of(name), attribution):
        assert "CC BY-SA 3.0" in text and "WikiText-2" in text
