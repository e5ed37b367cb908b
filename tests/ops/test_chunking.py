"""Cutting time into chunks."""

import numpy as np
import pytest

from elita_tf.ops import chunking
from tests import helpers
from tests.helpers import BATCH, CHUNK, HEADS, TIME, VALUE_DIM


@pytest.mark.parametrize("time", [1, CHUNK, TIME])
def test_split_and_merge(time: int) -> None:
    x = np.random.default_rng(0).standard_normal((BATCH, time, HEADS, VALUE_DIM))
    chunks = chunking.split_chunks(x, CHUNK, padding=-np.inf)
    (array,) = helpers.leaves(chunks)
    num_chunks = (time + CHUNK - 1) // CHUNK
    assert array.shape == (BATCH, num_chunks, HEADS, CHUNK, VALUE_DIM)
    for t in range(num_chunks * CHUNK):
        position = array[:, t // CHUNK, :, t % CHUNK]
        assert np.array_equal(position, x[:, t]) if t < time else np.isneginf(position).all()
    assert np.array_equal(helpers.leaves(chunking.merge_chunks(chunks, time))[0], x)


@pytest.mark.parametrize(
    ("asked", "time", "expected"), [(1, 9, 1), (3, 9, 4), (64, 13, 16), (64, 1, 1), (5, None, 8)]
)
def test_chunk_size_is_a_power_of_two_no_larger_than_needed(
    asked: int, time: int | None, expected: int
) -> None:
    assert chunking.fit_chunk_size(asked, time) == expected
