"""Inputs of functional models with and without a padding mask."""

from typing import Any


class OptionalPaddingMask:
    """Mixin of functional models: inputs without a `padding_mask` have no padding.

    Keras takes None for an optional input, but not a dict without it.
    """

    def __call__(self, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().__call__({"padding_mask": None, **inputs}, *args, **kwargs)

    def call(self, inputs: dict[str, Any], training: bool | None = None, mask: Any = None) -> Any:
        return super().call({"padding_mask": None, **inputs}, training=training, mask=mask)
