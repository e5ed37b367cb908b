"""Trained models that come with the package."""

from importlib import import_module
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "presets"

# By name, as KerasHub describes its own.
PRESETS: dict[str, dict[str, Any]] = {
    "elita_wikitext2": {
        "metadata": {
            "description": (
                "ELiTA with a forget gate a head: 3 blocks of width 64, trained on WikiText-2 raw "
                "with a SentencePiece vocabulary of 2,048. See its model card, README.md."
            ),
            "params": 275_248,
            "path": "elita",
        },
    },
}


class PackagedPresets:
    """Mixin of KerasHub's classes: `from_preset` takes names of `presets` too, offline."""

    presets = PRESETS

    @classmethod
    def from_preset(cls, preset: str, *args: Any, **kwargs: Any) -> Any:
        """As in KerasHub, from a folder, a handle, or a name of `presets`."""
        # A preset names the classes of the whole model; they are known once `models` is imported.
        import_module("elita_tf.models")
        located = str(FOLDER / preset) if preset in PRESETS else preset
        return super().from_preset(located, *args, **kwargs)
