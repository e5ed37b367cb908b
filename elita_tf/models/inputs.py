"""The inputs of the functional models: token ids, and optionally a padding mask and segments."""

from typing import Any

import keras
from keras import ops

from elita_tf.ops.arguments import require_segment_ids, require_shapes, segment_axes

_OPTIONAL = {"padding_mask": None, "segment_ids": None}


class OptionalInputs:
    """Mixin of functional models: inputs may lack `padding_mask` and `segment_ids`.

    Keras takes None for an optional input, but refuses a dict without it. The model has a
    `vocabulary_size`.
    """

    def __call__(self, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = self._complete(inputs)
        require_ids(self.name, self.vocabulary_size, token_ids=inputs["token_ids"])
        return super().__call__(inputs, *args, **kwargs)

    def call(self, inputs: dict[str, Any], training: bool | None = None, mask: Any = None) -> Any:
        return super().call(self._complete(inputs), training=training, mask=mask)

    def compute_output_spec(
        self, inputs: dict[str, Any], training: bool | None = None, mask: Any = None
    ) -> Any:
        inputs = self._complete(inputs)
        # The outputs have the same shape whether an optional input is there or not.
        token_ids = inputs["token_ids"]
        present = {name: token_ids if x is None else x for name, x in inputs.items()}
        return super().compute_output_spec(present, training=training, mask=mask)

    def compute_output_shape(self, input_shape: dict[str, Any]) -> tuple[int | None, ...]:
        if not isinstance(input_shape, dict) or "token_ids" not in input_shape:
            raise ValueError(
                f"{self.name} takes a dict of inputs: expected the shapes of `token_ids` and, if "
                "there are, of `padding_mask` and `segment_ids` by these names; received "
                f"{input_shape!r}."
            )
        shapes = dict.fromkeys(_OPTIONAL, input_shape["token_ids"])
        return super().compute_output_shape({**shapes, **input_shape})

    def _complete(self, inputs: dict[str, Any]) -> dict[str, Any]:
        require_inputs(self.name, inputs)
        return {**_OPTIONAL, **inputs}


def symbolic_inputs() -> dict[str, Any]:
    """The inputs of a functional model."""
    return {
        "token_ids": keras.Input((None,), dtype="int32", name="token_ids"),
        "padding_mask": keras.Input((None,), dtype="bool", name="padding_mask", optional=True),
        "segment_ids": keras.Input((None,), dtype="int32", name="segment_ids", optional=True),
    }


def mixer_tensors(inputs: dict[str, Any]) -> dict[str, Any]:
    """What a mixer gets of these inputs beside the hidden states, as keyword arguments."""
    return {"mask": inputs.get("padding_mask"), "segment_ids": inputs.get("segment_ids")}


def require_inputs(model: str, inputs: Any, **labels: Any) -> None:
    """Raise a ValueError unless these are a model's inputs, and fit each other and the labels."""
    if not isinstance(inputs, dict) or "token_ids" not in inputs:
        received = sorted(inputs) if isinstance(inputs, dict) else type(inputs).__name__
        raise ValueError(
            f"{model} takes a dict of `token_ids` and, if there is padding, `padding_mask`; "
            f'received {received}. Pass ids as {{"token_ids": ids}}; strings need a model with a '
            "preprocessor."
        )
    unknown = sorted(set(inputs) - {"token_ids", *_OPTIONAL})
    if unknown:
        raise ValueError(
            f"{model} takes `token_ids`, `padding_mask` and `segment_ids`; received also "
            f"{', '.join(unknown)}. Leave out or rename what is not among the three."
        )
    tensors = {"token_ids": (inputs["token_ids"], "batch time")}
    if inputs.get("padding_mask") is not None:
        tensors["padding_mask"] = inputs["padding_mask"], "batch time"
    tensors |= segment_axes(inputs.get("segment_ids"))
    tensors |= {name: (each, "batch time") for name, each in labels.items()}
    require_shapes(model, **tensors)
    require_segment_ids(model, inputs.get("segment_ids"))


def require_stream(model: str, inputs: Any, state: Any) -> None:
    """`require_inputs`, and a ValueError for a state that is not a dict."""
    require_inputs(model, inputs)
    if not isinstance(state, dict):
        raise ValueError(
            f"{model} goes on from a state, a flat dict of arrays; received "
            f"{type(state).__name__}. Start from `get_initial_state(batch_size)` or `prefill`."
        )


def require_ids(model: str, vocabulary_size: int, **ids: Any) -> None:
    """Raise a ValueError for ids that the vocabulary lacks, if their values are known by now.

    They are in arrays and in eager calls, and are not in a graph. Negative labels are allowed, as
    they mark what has no part in the loss.
    """
    for name, each in ids.items():
        try:
            values = ops.convert_to_numpy(each)
        except (NotImplementedError, TypeError, ValueError):  # a tensor of a graph
            continue
        wrong = values >= vocabulary_size
        if name == "token_ids":
            wrong = wrong | (values < 0)
        if wrong.any():
            raise ValueError(
                f"`{name}` of {model}: expected ids below the `vocabulary_size` of "
                f"{vocabulary_size}, received {values[wrong][0]}. Tokenize with the model's own "
                "tokenizer."
            )
