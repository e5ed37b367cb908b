"""The card of a preset, `README.md`, as the Hugging Face Hub reads it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

CARD = "README.md"
# By it, a card that was written here is told from one that somebody has written or changed.
_MARK = (
    "<!-- Written by save_to_preset, which replaces this file as long as this line is in it. -->"
)
_TEXT = """{front_matter}
# {name}

{description}, from the package elita_tf.

    from elita_tf.models import {class_name}
    model = {class_name}.from_preset("{folder}")

| argument | value |
|---|---|
{rows}

What it was trained on, its figures and its limits are known to its author: write them here, and
the licence in the first lines.

{mark}
"""


def front_matter(license: str, datasets: Sequence[str]) -> str:
    """The first lines of a card, in YAML.

    Args:
        license: of the weights, by the Hub's names, such as "cc-by-sa-3.0".
        datasets: what the model was trained on, by the Hub's names, such as "Salesforce/wikitext".
    """
    lines = ["library_name: keras-hub", "pipeline_tag: text-generation", f"license: {license}"]
    lines += _listed("tags", ["elita_tf", "keras", "linear-attention", "language-model"])
    lines += _listed("datasets", datasets) if datasets else []
    return "\n".join(["---", *lines, "---"])


def describe(backbone: Any) -> str:
    """The model in a sentence without its verb."""
    return (
        f"A decoder language model of {backbone.count_params():,} parameters with a state of "
        f"constant size: {', '.join(dict.fromkeys(backbone.mixers))} and `{backbone.feed_forward}` "
        f"in {backbone.num_layers} blocks of width {backbone.hidden_dim}, a vocabulary of "
        f"{backbone.vocabulary_size:,}"
    )


def write_card(model: Any, folder: Path | str, license: str, datasets: Sequence[str]) -> None:
    """Writes the card of a backbone or a model into its preset, unless it has one of its own."""
    path = Path(folder) / CARD
    if path.exists() and _MARK not in path.read_text(encoding="utf-8"):
        return
    backbone = getattr(model, "backbone", model)
    config = {k: v for k, v in backbone.get_config().items() if k not in ("name", "trainable")}
    config["dtype"] = backbone.dtype_policy.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        _TEXT.format(
            front_matter=front_matter(license, datasets),
            name=Path(folder).resolve().name,
            description=describe(backbone),
            class_name=type(model).__name__,
            folder=Path(folder).name or ".",
            rows="\n".join(f"| {name} | {value} |" for name, value in config.items()),
            mark=_MARK,
        ),
        encoding="utf-8",
    )


def _listed(name: str, values: Sequence[str]) -> list[str]:
    return [f"{name}:", *(f"- {value}" for value in values)]
