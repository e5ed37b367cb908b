"""Samplers that weigh whole texts, such as beam and contrastive search, in KerasHub's own loop."""

from functools import partial
from typing import Any

import keras_hub
import numpy as np
from keras import ops

from elita_tf.models.decoding import State

# A search of fewer columns would cost another compilation and save next to nothing.
_FEWEST_COLUMNS = 64


def search(model: Any, token_ids: Any, prompts: Any, state: State, stops: Any) -> Any:
    """The rows, padding replaced by what the model's sampler finds.

    A beam that a longer prompt overwrites still decides between the beams (KerasHub 0.32), so that
    prompts of several lengths get other texts together than each alone; `search_rows` has none.

    Args:
        model: an `ElitaCausalLM`.
        token_ids: (batch, max_length).
        prompts: boolean (batch, max_length), padding at the end. Columns that are padding in every
            row may come before, so that lengths share a program.
        state: where to go on from.
        stops: ids, or None.
    """
    max_length = ops.shape(token_ids)[1]
    columns = ops.arange(max_length, dtype="int32")
    start = ops.cast(ops.min(ops.argmax(ops.cast(prompts, "int32"), axis=1)), "int32")
    # The step before `index` reads the last token that all rows have.
    index = start + ops.min(ops.sum(ops.cast(prompts, "int32"), axis=1))
    backbone, hidden_states = model.backbone, None
    if isinstance(model.sampler, keras_hub.samplers.ContrastiveSampler):
        inputs = {"token_ids": token_ids, "padding_mask": prompts}
        hidden_states, _ = backbone.call_with_state(inputs, state)
    seen = {"token_ids": token_ids, "padding_mask": prompts & (columns < index - 1)}
    _, state = backbone.call_with_state(seen, state)

    def advance(tokens: Any, state: State, index: Any) -> tuple[Any, Any, State]:
        last = ops.slice(tokens, [0, index - 1], [ops.shape(tokens)[0], 1])
        hidden, state = backbone.call_with_state({"token_ids": last}, state)
        logits = backbone.token_embedding(hidden, reverse=True)
        return logits[:, 0], hidden[:, 0], state

    return model.sampler(
        next=advance,
        prompt=token_ids,
        cache=state,
        index=index,
        mask=prompts | (columns < start),
        stop_token_ids=stops,
        hidden_states=hidden_states,
        model=model,
    )


def search_rows(
    model: Any, rows: list[np.ndarray], state: State | None, num_columns: int, stops: list[int]
) -> list[np.ndarray]:
    """What the sampler adds to every row, up to `num_columns` in all.

    Rows of one length are searched together.
    """
    function = partial(search, model, stops=tuple(stops) or None)
    variables = tuple(map(id, model.variables))
    program = model._program(("search", variables, *stops), function, model.sampler)
    state = model.backbone.get_initial_state(len(rows)) if state is None else state
    shift = max(_FEWEST_COLUMNS, 1 << (num_columns - 1).bit_length()) - num_columns
    lengths, found = np.array([len(row) for row in rows]), [np.zeros(0)] * len(rows)
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        around = [[0, 0], [shift, num_columns - length]]
        token_ids = np.pad(np.stack([rows[i] for i in chosen]), around)
        columns = np.arange(token_ids.shape[1]) - shift
        mask = np.tile((columns >= 0) & (columns < length), (len(chosen), 1))
        of_rows = {name: ops.take(leaf, chosen, axis=0) for name, leaf in state.items()}
        filled = program(*map(ops.convert_to_tensor, (token_ids, mask)), of_rows)
        for i, row in zip(chosen, ops.convert_to_numpy(filled), strict=True):
            found[i] = row[shift + length :]
    return found
