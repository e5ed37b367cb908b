"""Generation on the recurrent state: the prompt in parallel, then one step a token."""

from collections.abc import Callable, Sequence
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from elita_tf.models.inputs import require_ids, require_inputs
from elita_tf.ops.arguments import require_shapes

# A shorter bucket would cost another compilation and save next to nothing.
_SHORTEST_BUCKET = 64


class Generation:
    """Mixin of a KerasHub CausalLM whose `backbone` has a recurrent state.

    The model says by `chooses_jit_compile` whether `compile` left the choice of XLA to it.
    """

    def prefill(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        state: dict[str, Any] | None = None,
        segment_ids: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Read a prompt, in the parallel form.

        Args:
            token_ids: (batch, time).
            padding_mask: optional boolean (batch, time); padding may stand on either side.
            state: where to go on from, by default the beginning.
            segment_ids: optional integers (batch, time): see `ElitaBackbone`.

        Returns:
            The logits of the token after the last real one, (batch, vocabulary_size), and the
            state: a flat dict of arrays, the batch first, that can be stored and fed back.
        """
        optional = {"padding_mask": padding_mask, "segment_ids": segment_ids}
        inputs = {"token_ids": token_ids, **optional}
        require_inputs(self.name, inputs)
        batch_size, time = ops.shape(token_ids)
        if state is None:
            state = self.backbone.get_initial_state(batch_size)
        hidden_states, state = self.backbone.call_with_state(inputs, state)
        if padding_mask is None:
            last = hidden_states[:, -1:]
        else:
            index = ops.max(ops.where(padding_mask, ops.arange(time), 0), axis=1)
            last = ops.take_along_axis(hidden_states, index[:, None, None], axis=1)
        return self.backbone.token_embedding(last, reverse=True)[:, 0], state

    def step(
        self, token_ids: Any, state: dict[str, Any], segment_ids: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """Read one token: the logits of the next one, (batch, vocabulary_size), and the state.

        Args:
            token_ids: (batch,).
            state: of `prefill`, or of the step before.
            segment_ids: optional integers (batch,). A row whose id is not that of its last token
                starts from the empty state.

        Raises:
            ValueError: token ids of another rank, or a state of other rows or of another model.
        """
        segments = {} if segment_ids is None else {"segment_ids": (segment_ids, "batch")}
        require_shapes(self.name, token_ids=(token_ids, "batch"), **segments)
        # An empty state would be a new beginning for `prefill`, and is a mistake here.
        state = {} if state is None else state
        if segment_ids is not None:
            segment_ids = ops.expand_dims(segment_ids, 1)
        return self.prefill(ops.expand_dims(token_ids, 1), state=state, segment_ids=segment_ids)

    def generate_step(
        self, inputs: dict[str, Any], stop_token_ids: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """Fill up one batch of prompts with the compiled sampler; what `generate` compiles.

        Args:
            inputs: `token_ids` and `padding_mask`, (batch, max_length), padded at the end. Columns
                that are padding in every row may come before.
            stop_token_ids: a row ends at the first of these that is not of its prompt.
        """
        token_ids, prompts = inputs["token_ids"], ops.cast(inputs["padding_mask"], "bool")
        batch_size, max_length = ops.shape(token_ids)
        columns = ops.arange(max_length, dtype="int32")
        start = ops.min(ops.argmax(ops.cast(prompts, "int32"), axis=1))
        shortest = ops.min(ops.sum(ops.cast(prompts, "int32"), axis=1))
        index = ops.cast(start, "int32") + shortest
        # The step before `index` reads the last token that all rows have.
        seen = {"token_ids": token_ids, "padding_mask": prompts & (columns < index - 1)}
        state = self.backbone.get_initial_state(batch_size)
        _, state = self.backbone.call_with_state(seen, state)

        def advance(tokens: Any, state: dict[str, Any], index: Any) -> tuple[Any, Any, Any]:
            last = ops.slice(tokens, [0, index - 1], [ops.shape(tokens)[0], 1])
            hidden, state = self.backbone.call_with_state({"token_ids": last}, state)
            logits = self.backbone.token_embedding(hidden, reverse=True)
            return logits[:, 0], hidden[:, 0], state

        fixed = prompts | (columns < start)
        contrastive = isinstance(self.sampler, keras_hub.samplers.ContrastiveSampler)
        token_ids = self.sampler(
            next=advance,
            prompt=token_ids,
            cache=state,
            index=index,
            mask=fixed,
            stop_token_ids=stop_token_ids,
            hidden_states=self.backbone(inputs) if contrastive else None,
            model=self,
        )
        ended = ops.zeros_like(fixed)
        for stop in stop_token_ids or ():
            ended = ended | (~fixed & (token_ids == stop))
        after_end = ops.cumsum(ops.cast(ended, "int32"), axis=1) - ops.cast(ended, "int32") > 0
        return {"token_ids": token_ids, "padding_mask": ~after_end & (columns >= start)}

    def make_generate_function(self) -> Callable[..., dict[str, Any]]:
        """The compiled `generate_step`: one compilation for a bucket of lengths."""
        if self.generate_function is None:
            of_training = self.jit_compile
            if self.chooses_jit_compile:
                self.jit_compile = None  # Keras' own choice
            self.generate_function = in_buckets(
                super().make_generate_function(), self.name, self.vocabulary_size
            )
            self.jit_compile = of_training
        return self.generate_function


def bucket_length(length: int) -> int:
    """The power of two at or above `length`, at least 64."""
    return max(_SHORTEST_BUCKET, 1 << max(length - 1, 0).bit_length())


def in_buckets(
    generate: Callable[..., dict[str, Any]], model: str, vocabulary_size: int
) -> Callable[..., dict[str, Any]]:
    """`generate` on prompts shifted to the end of an array of `bucket_length` columns.

    Generation ends where the array ends, so the very number of tokens asked for is generated. The
    model's name and the size of its vocabulary are for the check of the prompts.
    """

    def generate_in_bucket(inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        token_ids, mask = (
            ops.convert_to_numpy(inputs[name]) for name in ("token_ids", "padding_mask")
        )
        mask = mask.astype(bool)
        if not mask.any(axis=1).all():
            raise ValueError(
                f"Prompt {int(np.argmin(mask.any(axis=1)))} is empty: its `padding_mask` is False "
                "everywhere, and there is nothing to go on from. Give every row a token."
            )
        require_ids(model, vocabulary_size, token_ids=np.where(mask, token_ids, 0))
        # Padding that stands before or within a prompt moves behind it.
        order = np.argsort(~mask, axis=1, kind="stable")
        arrays = {
            "token_ids": np.take_along_axis(token_ids, order, axis=1).astype("int32"),
            "padding_mask": np.take_along_axis(mask, order, axis=1),
        }
        shift = bucket_length(mask.shape[1]) - mask.shape[1]
        bucket = {name: np.pad(x, [[0, 0], [shift, 0]]) for name, x in arrays.items()}
        outputs = generate({k: ops.convert_to_tensor(x) for k, x in bucket.items()}, **kwargs)
        return {name: x[:, shift:] for name, x in outputs.items()}

    return generate_in_bucket
