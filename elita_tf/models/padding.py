"""Inputs of functional models with and without a padding mask."""

from typing import Any

from elita_tf.ops.arguments import require_shapes


class OptionalPaddingMask:
    """Mixin of functional models: inputs without a `padding_mask` have no padding.

    Keras takes None for an optional input, but not a dict without it.
    """

    def __call__(self, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        require_inputs(self.name, inputs)
        return super().__call__({"padding_mask": None, **inputs}, *args, **kwargs)

    def call(self, inputs: dict[str, Any], training: bool | None = None, mask: Any = None) -> Any:
        return super().call({"padding_mask": None, **inputs}, training=training, mask=mask)


def require_inputs(model: str, inputs: Any, **labels: Any) -> None:
    """Raise a ValueError unless these are token ids, with a mask, and labels, that fit."""
    if not isinstance(inputs, dict) or "token_ids" not in inputs:
        received = sorted(inputs) if isinstance(inputs, dict) else type(inputs).__name__
        raise ValueError(
            f"{model} takes a dict of `token_ids` and, if there is padding, `padding_mask`; "
            f"received {received}. Strings need a model with a preprocessor."
        )
    tensors = {"token_ids": (inputs["token_ids"], "batch time")}
    if inputs.get("padding_mask") is not None:
        tensors["padding_mask"] = inputs["padding_mask"], "batch time"
    tensors |= {name: (each, "batch time") for name, each in labels.items()}
    require_shapes(model, **tensors)


def require_stream(model: str, inputs: Any, state: Any) -> None:
    """`require_inputs`, and a ValueError for a state that is no dict."""
    require_inputs(model, inputs)
    if not isinstance(state, dict):
        raise ValueError(
            f"{model} goes on from a state, a flat dict of arrays; received "
            f"{type(state).__name__}. Start from `get_initial_state(batch_size)` or `prefill`."
        )
