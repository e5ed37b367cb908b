"""The prompts of `generate`, `stream` and `read` in one form, whatever they come as."""

import numbers
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from elita_tf.models.inputs import require_ids

_FORMS = (
    "ids as a list, an array or a ragged list, or a dict of `token_ids` and, if there is padding, "
    "`padding_mask`"
)


class Prompts(NamedTuple):
    """Prompts, checked, and where they go on from.

    rows: the ids of every prompt, int32 of rank 1, without padding.
    is_single: whether they came as one prompt without a batch axis.
    width: the columns that they had with their padding; None if there was no padding mask.
    """

    rows: list[np.ndarray]
    is_single: bool
    width: int | None = None

    def max_length(self, model: Any, max_length: Any) -> int:
        """The tokens of prompt and continuation, given or by default, checked."""
        if max_length is None and model.preprocessor is not None:
            max_length = model.preprocessor.sequence_length
        max_length = self.width if max_length is None else max_length
        is_count = isinstance(max_length, numbers.Integral) and not isinstance(max_length, bool)
        if not is_count or max_length < 1:
            raise ValueError(
                f"`max_length` of {model.name} counts the tokens of prompt and continuation: "
                f"expected an integer of at least 1, received {max_length!r}. By default it is the "
                "width of ids that come with a `padding_mask`."
            )
        longest = int(np.argmax([len(row) for row in self.rows]))
        if len(self.rows[longest]) > max_length:
            raise ValueError(
                f"Prompt {longest} has {len(self.rows[longest])} tokens, more than the "
                f"`max_length` of {max_length} for prompt and continuation together. Pass a "
                "larger `max_length` or a shorter prompt."
            )
        return int(max_length)


def prompts_of(model: Any, inputs: Any, max_length: Any, num_rows: int | None) -> Prompts:
    """The prompts of a model in one form.

    Args:
        model: an `ElitaCausalLM`.
        inputs: texts, if the model has a preprocessor; a dict with ids, or else anything with ids.
        max_length: of the call, or None.
        num_rows: of the state that the prompts go on from, or None without one.

    Raises:
        ValueError: other inputs, an empty prompt without a state, or another number of prompts
            than the state has rows, unless there is one row.
    """
    if inputs is None and num_rows is not None:
        found = Prompts([np.zeros(0, "int32")] * num_rows, num_rows == 1)
    elif model.preprocessor is None or isinstance(inputs, dict):
        found = id_prompts(model.name, model.vocabulary_size, inputs)
    else:
        found = text_prompts(model.preprocessor, inputs, max_length, num_rows is not None)
    empty = [i for i, row in enumerate(found.rows) if not len(row)]
    if empty and num_rows is None:
        raise ValueError(
            f"Prompt {empty[0]} is empty, and there is nothing to go on from. Give every prompt a "
            "token, or pass a `state` of `read`."
        )
    if num_rows not in (None, 1, len(found.rows)):
        raise ValueError(
            f"{model.name} received {len(found.rows)} prompts and a state of {num_rows} rows. "
            "Pass as many prompts as rows, or a state of one row, which serves them all; "
            "`keras.ops.take(leaf, rows, axis=0)` of every leaf repeats or chooses rows."
        )
    return found


def text_prompts(preprocessor: Any, texts: Any, max_length: Any, goes_on: bool) -> Prompts:
    """Prompts that are texts: the preprocessor's, but for those that go on from a state.

    They have no start token and no length of their own.
    """
    is_single = not isinstance(texts, list | tuple) and np.ndim(texts) == 0
    if not goes_on and max_length is not None:
        inputs = preprocessor.generate_preprocess(texts, sequence_length=max_length)
        token_ids, mask = (
            np.atleast_2d(ops.convert_to_numpy(inputs[name]))
            for name in ("token_ids", "padding_mask")
        )
        rows = [row[real] for row, real in zip(token_ids, mask.astype(bool), strict=True)]
    else:
        if not preprocessor.built:
            preprocessor.build(None)
        tokenizer = preprocessor.tokenizer
        start = [tokenizer.start_token_id] if preprocessor.add_start_token and not goes_on else []
        rows = tokenizer(texts)
        rows = [start + row for row in ([rows] if is_single else rows)]
    return Prompts([np.asarray(row, "int32") for row in rows], is_single)


def id_prompts(model: str, vocabulary_size: int, inputs: Any) -> Prompts:
    """Prompts that are ids: see `_FORMS`; padding may stand anywhere in a row.

    Raises:
        ValueError: anything else, with `segment_ids`, with a mask of another shape, or with ids
            outside of the vocabulary.
    """
    inputs = inputs if isinstance(inputs, dict) else {"token_ids": inputs}
    unknown = sorted(set(inputs) - {"token_ids", "padding_mask", "segment_ids"})
    if unknown or "token_ids" not in inputs:
        raise ValueError(f"Prompts of {model}: expected {_FORMS}; received {sorted(inputs)}.")
    if inputs.get("segment_ids") is not None:
        raise ValueError(
            f"Prompts of {model} are one segment each, and `segment_ids` are not for them. Pass "
            "the ids of the last segment of every row, which is all that the model would see."
        )
    rows, is_single = _rows(model, inputs["token_ids"])
    width, mask = None, inputs.get("padding_mask")
    if mask is not None:
        masks = _rows(model, mask, is_mask=True)[0]
        if [row.shape for row in rows] != [row.shape for row in masks]:
            raise ValueError(
                f"`padding_mask` of {model} has {_sizes(masks)}, and `token_ids` have "
                f"{_sizes(rows)}. Pass a mask with an element for every id."
            )
        width = max(len(row) for row in rows)
        rows = [row[real] for row, real in zip(rows, masks, strict=True)]
    for row in rows:
        require_ids(model, vocabulary_size, token_ids=row)
    return Prompts([row.astype("int32") for row in rows], is_single, width)


def _rows(model: str, ids: Any, is_mask: bool = False) -> tuple[list[np.ndarray], bool]:
    ids = ids.to_list() if hasattr(ids, "to_list") else ids  # a ragged tensor
    ids = ops.convert_to_numpy(ids) if ops.is_tensor(ids) else ids
    is_scalar = not isinstance(ids, list | tuple) and np.ndim(ids) == 0
    rows = [] if is_scalar else [np.asarray(row) for row in ids]
    # No ids at all are one prompt, which may be empty with a state.
    is_single = not is_scalar and np.ndim(ids[:1]) == 1 and not any(row.ndim for row in rows)
    rows = [np.array(rows)] if is_single else rows
    if is_mask:
        return [row.astype(bool) for row in rows], is_single
    wrong = [row for row in rows if row.ndim != 1 or (row.size and row.dtype.kind not in "iu")]
    if wrong or not rows:
        received = f"a row of {wrong[0].dtype} {wrong[0].shape}" if wrong else repr(ids)
        raise ValueError(f"Prompts of {model}: expected {_FORMS}; received {received:.80}.")
    return rows, is_single


def _sizes(rows: list[np.ndarray]) -> str:
    return f"{len(rows)} rows of {', '.join(str(len(row)) for row in rows[:5])} elements"


def stop_ids(model: str, vocabulary_size: int, stop_token_ids: Any, end: int | None) -> list[int]:
    """The ids that end a text, as a list; an empty one ends none.

    Args:
        model: for the messages.
        vocabulary_size: what every id must be below.
        stop_token_ids: None, "auto", an id, or ids as a list, tuple, set or array.
        end: the id that "auto" stands for; None if the model has no tokenizer.

    Raises:
        ValueError: anything else, and "auto" without a tokenizer.
    """
    if isinstance(stop_token_ids, str) and stop_token_ids == "auto":
        if end is None:
            raise ValueError(
                'A `preprocessor` must be attached to the model if `stop_token_ids="auto"`: it is '
                "what knows the end token. Pass the ids that end a text, or None to go on to "
                "`max_length`."
            )
        return [end]
    if stop_token_ids is None:
        return []
    if ops.is_tensor(stop_token_ids):
        stop_token_ids = ops.convert_to_numpy(stop_token_ids)
    if isinstance(stop_token_ids, np.ndarray):
        stop_token_ids = stop_token_ids.tolist()
    is_one = isinstance(stop_token_ids, numbers.Number | str | bytes)
    each = [stop_token_ids] if is_one else list(stop_token_ids)
    for token in each:
        is_id = isinstance(token, numbers.Integral) and not isinstance(token, bool)
        if not is_id or not 0 <= token < vocabulary_size:
            raise ValueError(
                f"`stop_token_ids` of {model}: expected ids from 0 to {vocabulary_size - 1}, None "
                f'or "auto"; received {token!r}. For a text, pass the ids that the tokenizer gives '
                "for it, if it is one token."
            )
    return sorted({int(token) for token in each})
