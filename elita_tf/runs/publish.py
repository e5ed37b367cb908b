"""Makes a run a preset of the package, `elita publish --run_dir DIR --data_dir DIR`, in a clone.

It writes the preset with float16 weights and its model card into `elita_tf/presets/NAME`. Into
`tests/models/NAME` it writes windows of the validation split, with which a test checks the loss
that the card gives. Both folders hold what was made from WikiText, and name its licence.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from elita_tf.data import encode_split, load_corpus, load_tokenizer
from elita_tf.models import ElitaCausalLM
from elita_tf.models.model_card import describe, front_matter
from elita_tf.runs.assembly import load_run
from elita_tf.runs.command_line import command_parser, path
from elita_tf.runs.evaluation import evaluate
from elita_tf.runs.generation import ORIGINS
from elita_tf.runs.recipe import load_recipe

ROOT = Path(__file__).parents[2]
WINDOWS_FILE = "validation_windows.npy"
NUM_WINDOWS = 64
LICENCE = "CC BY-SA 3.0 (https://creativecommons.org/licenses/by-sa/3.0/)"
SOURCE = (
    "WikiText-2 (Merity et al., Pointer Sentinel Mixture Models, 2016, arXiv:1609.07843), "
    "articles from Wikipedia by its contributors"
)
CARD = """{front_matter}

# {name}

{description}, from the package elita_tf.

    from elita_tf.models import ElitaCausalLM
    model = ElitaCausalLM.from_preset("{name}")
    model.generate("The", max_length=60)

## Training

{source}, raw; {steps:,} steps of {batch_size} windows of {context_length} tokens:

    {command}
    elita publish --run_dir RUN --data_dir DIR

## Figures

| split | window | loss (nats per token) | bits per byte | perplexity per word |
|---|---|---|---|---|
{rows}

On the {num_windows} windows of `tests/models/{name}/{windows_file}`, with the float16 weights of
this preset: {window_loss:.4f} nats per token.

## Limits

It is small, has read two million words, and is meant for trying out and testing the package. Its
texts are only in parts grammatical, and what they claim is invented. They can repeat the biases of
its source.

## Licence

Weights and tokenizer are made from {source}, and are given under the same licence, {licence}. The
code of elita_tf is under Apache-2.0.
"""
ATTRIBUTION = """The token ids in `{windows_file}` are the first {num_windows} windows of the
validation split of {source}, encoded with the tokenizer of the preset `{name}`.
Licence of the text: {licence}.
"""


def halve_weights(path: Path) -> None:
    """Stores the numbers of a weights file in float16."""
    with tempfile.TemporaryDirectory() as folder:
        halved = Path(folder) / path.name
        with h5py.File(path) as source, h5py.File(halved, "w") as target:
            target.attrs.update(source.attrs)

            def copy(name: str, item: Any) -> None:
                if isinstance(item, h5py.Dataset):
                    numbers = item[()]
                    is_float = numbers.dtype.kind == "f"
                    target.create_dataset(
                        name, data=numbers.astype("float16") if is_float else numbers
                    )
                else:
                    target.require_group(name)
                target[name].attrs.update(item.attrs)

            source.visititems(copy)
        shutil.copyfile(halved, path)


def window_loss(model: ElitaCausalLM, windows: np.ndarray) -> float:
    """The mean loss of windows (n, length + 1) of token ids, each from a fresh state."""
    windows = np.asarray(windows, "int32")
    return float(np.mean(model.token_losses(windows[:, :-1], windows[:, 1:])))


def validation_windows(run_dir: Path, data_dir: Path | None) -> np.ndarray:
    """The first windows of the validation split: uint16 (n, length + 1), as in evaluation."""
    recipe = load_recipe(str(run_dir / "recipe.toml"))
    split = load_corpus(recipe.corpus, data_dir)["valid"]
    ids = np.asarray(encode_split(load_tokenizer(run_dir / "tokenizer"), split))
    length = recipe.context_length
    starts = length * np.arange(NUM_WINDOWS)
    return ids[starts[:, None] + np.arange(length + 1)].astype("uint16")


def card(name: str, run_dir: Path, data_dir: Path | None, loss: float) -> str:
    """The model card."""
    recipe = load_recipe(str(run_dir / "recipe.toml"))
    figures = [
        evaluate(run_dir, data_dir, split, context)
        for split, context in (("valid", 256), ("test", 256), ("test", 16_384))
    ]
    rows = [
        f"| {each['split']} | {each['context']:,} | {each['loss']:.3f} | "
        f"{each['bits_per_byte']:.3f} | {each['word_perplexity']:.0f} |"
        for each in figures
    ]
    backbone = load_run(run_dir).backbone
    changed = {"learning_rate": recipe.learning_rate, "steps": recipe.steps, "seed": recipe.seed}
    overrides = " ".join(f"{key}={value:g}" for key, value in changed.items())
    return CARD.format(
        name=name,
        front_matter=front_matter(**ORIGINS["wikitext-2"]),
        description=describe(backbone),
        source=SOURCE,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        context_length=recipe.context_length,
        command=(
            f"elita train --recipe {recipe.architecture.replace('_', '-')}"
            f"-wikitext2-tuned --data_dir DIR --run_dir RUN --set {overrides}"
        ),
        rows="\n".join(rows),
        num_windows=NUM_WINDOWS,
        windows_file=WINDOWS_FILE,
        window_loss=loss,
        licence=LICENCE,
    )


def main(arguments: list[str] | None = None) -> None:
    """Writes the preset, its card and the windows."""
    parser = command_parser("publish", __doc__, "--run_dir runs/best --data_dir wikitext-2-raw")
    parser.add_argument("--run_dir", type=path, required=True, help="folder of `elita train`")
    parser.add_argument("--data_dir", type=path, help="folder with wiki.{train,valid,test}.raw")
    parser.add_argument("--name", default="elita_wikitext2", help="of the preset")
    options = parser.parse_args(arguments)
    preset = ROOT / "elita_tf" / "presets" / options.name
    tests = ROOT / "tests" / "models" / options.name
    windows = validation_windows(options.run_dir, options.data_dir)
    load_run(options.run_dir).save_to_preset(str(preset))
    halve_weights(preset / "model.weights.h5")
    keras.utils.clear_session()
    loss = window_loss(ElitaCausalLM.from_preset(str(preset)), windows)
    text = card(options.name, options.run_dir, options.data_dir, loss)
    (preset / "README.md").write_text(text, encoding="utf-8")
    tests.mkdir(parents=True, exist_ok=True)
    np.save(tests / WINDOWS_FILE, windows)
    (tests / "README.md").write_text(
        ATTRIBUTION.format(
            windows_file=WINDOWS_FILE,
            num_windows=NUM_WINDOWS,
            source=SOURCE,
            name=options.name,
            licence=LICENCE,
        ),
        encoding="utf-8",
    )
    print(json.dumps({"preset": str(preset), "window_loss": loss}))
