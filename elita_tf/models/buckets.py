"""Prompts of any length in arrays of few lengths, so that few graphs are compiled."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

_SHORTEST_BUCKET = 64


def bucket_length(length: int) -> int:
    """The power of two at or above `length`, at least 64."""
    return max(_SHORTEST_BUCKET, 1 << max(length - 1, 0).bit_length())


def in_buckets(generate: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """`generate` on prompts shifted to the end of an array of `bucket_length` columns.

    Generation ends where the array ends, so the very number of tokens asked for is generated.
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
