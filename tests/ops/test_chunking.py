"""Cutting an axis into pieces of one size, and joining them again."""

import numpy as np
import pytest

from elita_tf.ops import chunking
from tests import helpers
from tests.helpers import BATCH, CHUNK, HEADS, TIME, VALUE_DIM


@pytest.mark.parametrize("time", [1, CHUNK, TIME])
def test_split_and_merge_chunks(time: int) -> None:
    x = np.random.default_rng(0).standard_normal((BATCH, time, HEADS, VALUE_DIM))
    chunks = chunking.split_chunks(x, CHUNK)
    (array,) = helpers.leaves(chunks)
    num_chunks = (time + CHUNK - 1) // CHUNK
    assert array.shape == (BATCH, num_chunks, HEADS, CHUNK, VALUE_DIM)
    for t in range(num_chunks * CHUNK):
        position = array[:, t // CHUNK, :, t % CHUNK]
        assert np.array_equal(position, x[:, t]) if t < time else not position.any()
    assert np.array_equal(helpers.leaves(chunking.merge_chunks(chunks, time))[0], x)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("length", [1, CHUNK, TIME])
def test_split_and_merge_any_axis(axis: int, length: int) -> None:
    shape = np.insert([BATCH, HEADS], axis, length)
    x = np.random.default_rng(0).standard_normal(shape)
    pieces = chunking.split_axis(x, CHUNK, axis, padding=-np.inf)
    array = np.moveaxis(helpers.leaves(pieces)[0], (axis, axis + 1), (0, 1))
    rows = np.moveaxis(x, axis, 0)
    assert array.shape == ((length + CHUNK - 1) // CHUNK, CHUNK, BATCH, HEADS)
    for i, row in enumerate(array.reshape(-1, BATCH, HEADS)):
        assert np.array_equal(row, rows[i]) if i < length else np.isneginf(row).all()
    assert np.array_equal(helpers.leaves(chunking.merge_axis(pieces, length, axis))[0], x)


def test_a_known_length_of_none_gives_one_piece_of_padding() -> None:
    pieces = chunking.split_axis(np.zeros((0, HEADS)), CHUNK, axis=0, padding=2.0)
    assert np.array_equal(helpers.leaves(pieces)[0], np.full((1, CHUNK, HEADS), 2.0))
    assert tuple(chunking.merge_axis(pieces, 0, axis=0).shape) == (0, HEADS)


@pytest.mark.skipif(helpers.BACKEND != "tensorflow", reason="JAX knows all lengths")
def test_an_unknown_length_of_none_gives_one_piece_of_padding() -> None:
    import tensorflow as tf

    signature = [tf.TensorSpec((None, HEADS), "float32")]
    split = tf.function(lambda x: chunking.split_axis(x, CHUNK, 0, 2.0), signature)
    assert np.array_equal(split(np.zeros((0, HEADS))), np.full((1, CHUNK, HEADS), 2.0))


@pytest.mark.parametrize(
    ("asked", "time", "expected"), [(1, 9, 1), (3, 9, 4), (64, 13, 16), (64, 1, 1), (5, None, 8)]
)
def test_chunk_size_is_a_power_of_two_no_larger_than_needed(
    asked: int, time: int | None, expected: int
) -> None:
    assert chunking.fit_chunk_size(asked, time) == expected
