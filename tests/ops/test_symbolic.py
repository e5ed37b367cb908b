"""Ops of KerasTensors: layers of functional models, as the functions of `keras.ops` are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf import ops
from tests import helpers

BATCH, TIME, HEADS, KEY_DIM, VALUE_DIM, RANK, VOCABULARY = 2, 13, 3, 5, 7, 4, 11
RNG = np.random.default_rng(5)


def draw(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype("float32")


LOGITS, KEY = draw(BATCH, TIME, HEADS), draw(BATCH, TIME, HEADS, KEY_DIM)
VALUE = draw(BATCH, TIME, HEADS, VALUE_DIM)
DECAY, SEGMENTS = -np.abs(KEY), np.sort(RNG.integers(0, 3, (BATCH, TIME)), axis=1).astype("int32")
LABELS = RNG.integers(0, VOCABULARY, (BATCH, TIME)).astype("int32")
HIDDEN, KERNEL = draw(BATCH, TIME, KEY_DIM), draw(VOCABULARY, KEY_DIM)
CUBE = draw(KEY_DIM, RANK, VALUE_DIM)
STATE = ops.attention2_empty_state(BATCH, HEADS, VALUE_DIM)
# Functions of arrays, and the arrays.
CASES: dict[str, tuple[Callable, list[Any]]] = {
    "attention2": (
        lambda x, v, s: ops.attention2(x, 2 * x, -x, v, log_decay=-abs(x), segment_ids=s),
        [LOGITS, VALUE, SEGMENTS],
    ),
    "attention2_recurrent": (
        lambda x, v: ops.attention2_recurrent(x, 2 * x, -x, v),
        [LOGITS, VALUE],
    ),
    "attention2_step": (
        lambda x, v: ops.attention2_step(x, 2 * x, -x, v, STATE),
        [LOGITS[:, 0], VALUE[:, 0]],
    ),
    "gated_linear_attention": (
        lambda k, v, d: ops.gated_linear_attention(k, 2 * k, v, d, chunk_size=4),
        [KEY, VALUE, DECAY],
    ),
    "gated_linear_attention_recurrent": (
        lambda k, v, d: ops.gated_linear_attention_recurrent(k, 2 * k, v, log_decay=d),
        [KEY, VALUE, DECAY],
    ),
    "gated_linear_attention_step": (
        lambda k, v, d, s: ops.gated_linear_attention_step(k, k, v, d, state=s),
        [KEY[:, 0], VALUE[:, 0], DECAY[:, 0], draw(BATCH, HEADS, KEY_DIM, VALUE_DIM)],
    ),
    "feed_forward2": (
        lambda x, y: ops.feed_forward2(x, y, CUBE),
        [HIDDEN, draw(BATCH, TIME, RANK)],
    ),
    "linear_cross_entropy": (
        lambda x, y: ops.linear_cross_entropy(x, KERNEL, y),
        [HIDDEN, LABELS],
    ),
    "token_cross_entropy": (
        lambda x, y: ops.token_cross_entropy(x, KERNEL, y),
        [HIDDEN, LABELS],
    ),
}


def test_every_op_is_here() -> None:
    assert set(CASES) == set(ops.__all__) - {"Attention2State", "attention2_empty_state"}


@pytest.mark.parametrize("free", [False, True], ids=["static", "free"])
@pytest.mark.parametrize("name", CASES)
def test_a_functional_model_of_an_op(name: str, free: bool) -> None:
    function, arrays = CASES[name]
    axes = 1 if name.endswith("_step") else 2
    inputs = [
        keras.Input(
            batch_shape=(None,) * axes + array.shape[axes:] if free else array.shape,
            dtype=array.dtype,
        )
        for array in arrays
    ]
    outputs = function(*inputs)
    model = keras.Model(inputs, outputs)
    expected = helpers.jitted(function)(*arrays)
    received = helpers.jitted(model)(arrays)
    helpers.assert_close(received, expected, 1e-5)
    for symbol, array in zip(*map(keras.tree.flatten, (outputs, expected)), strict=True):
        assert len(symbol.shape) == len(array.shape)
        pairs = zip(symbol.shape, array.shape, strict=True)
        assert all(size in (None, known) for size, known in pairs)
        assert free or tuple(symbol.shape) == tuple(array.shape)


def test_such_a_model_trains_and_is_saved(tmp_path: Path) -> None:
    inputs = keras.Input((TIME, HEADS * KEY_DIM))
    heads = keras.layers.Reshape((TIME, HEADS, KEY_DIM))(keras.layers.Dense(15)(inputs))
    outputs, _ = ops.gated_linear_attention(heads, heads, heads, -keras.ops.relu(heads))
    model = keras.Model(inputs, keras.layers.Flatten()(outputs))
    model.compile("sgd", "mse", run_eagerly=not helpers.QUICKEST)
    x, y = draw(BATCH, TIME, 15), draw(BATCH, TIME * 15)
    before = model.get_weights()
    model.train_on_batch(x, y)
    assert np.abs(model.get_weights()[0] - before[0]).max() > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    helpers.assert_close(helpers.jitted(loaded)(x), helpers.jitted(model)(x), 0.0)


def test_bad_shapes_of_symbols_are_named() -> None:
    value, logits = keras.Input((TIME, HEADS, VALUE_DIM)), keras.Input((TIME, HEADS))
    with pytest.raises(ValueError, match=r"attention2 received .*expected key_logits"):
        ops.attention2(logits[..., :2], logits, logits, value)
