"""segment_ids of layers: packed documents are separate calls, in one call, in pieces, in steps."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf.layers import Streaming
from elita_tf.layers.segments import number_segments
from tests import helpers
from tests.helpers import LAYER_BOUND, jitted, randomized
from tests.mixers import MAIN, WIDTH

FACTORIES = MAIN
LAYERS = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
# Segments of 1 position, longer than a chunk, and several in one.
SEGMENT_IDS = np.array(
    [[4, 4, 4, 4, 4, 4, 4, 2, 0, 0, 4, 4, 4], [1, 2, 2, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4]]
)
BATCH, TIME = SEGMENT_IDS.shape
# Masked at the start, at the end, within segments and over all of one.
MASK = np.array(
    [[0, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1], [1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0]], bool
)


def make_layer(factory: Callable, dtype: str = "float64") -> keras.layers.Layer:
    layer = factory(dtype=dtype)
    layer.build((None, None, WIDTH))
    return randomized(layer, scale=0.3)


def make_inputs(dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH)).astype(dtype)


def separate(layer: keras.layers.Layer, mask: np.ndarray, numbers: np.ndarray, inputs: Any) -> Any:
    """The layer called once per row and segment, on its real positions; 0 at the others."""
    rows = []
    for row in range(BATCH):
        outputs: list = [keras.ops.zeros((1, WIDTH), "float64")] * TIME
        for number in np.unique(numbers[row]):
            places = np.flatnonzero((numbers[row] == number) & mask[row])
            piece = keras.ops.take(inputs[row : row + 1], places, axis=1)
            called = layer(piece)
            for i, place in enumerate(places):
                outputs[place] = called[:, i]
        rows.append(keras.ops.stack(outputs, axis=1))
    return keras.ops.concatenate(rows)


@LAYERS
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_packed_segments_are_separate_calls(factory: Callable, mask: np.ndarray | None) -> None:
    layer, inputs = make_layer(factory), make_inputs()
    real = np.ones_like(MASK) if mask is None else mask
    cotangents = [np.where(real[..., None], helpers.random_like([inputs])[0], 0.0)]

    def packed(x: Any) -> Any:
        outputs = layer(x, mask=mask, segment_ids=SEGMENT_IDS)
        return keras.ops.where(real[..., None], outputs, 0.0)

    received = helpers.vjp(packed, [inputs], cotangents)
    numbers = np.array(number_segments(SEGMENT_IDS, real))
    expected = helpers.vjp(partial(separate, layer, real, numbers), [inputs], cotangents)
    helpers.assert_close(received.outputs, expected.outputs, LAYER_BOUND)
    helpers.assert_close(received.gradients, expected.gradients, LAYER_BOUND)


def run_pieces(streaming: Callable, state: dict, split: tuple, mask: np.ndarray | None) -> tuple:
    """The outputs of all pieces of these lengths, and the last state."""
    pieces, start = [], 0
    for length in split:
        piece = slice(start, start + length)
        outputs, state = streaming(
            make_inputs()[:, piece],
            state,
            mask=None if mask is None else mask[:, piece],
            segment_ids=SEGMENT_IDS[:, piece],
        )
        pieces.append(helpers.leaves(outputs)[0])
        start += length
    return np.concatenate(pieces, axis=1), state


@LAYERS
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_pieces_and_steps_are_the_whole(factory: Callable, mask: np.ndarray | None) -> None:
    streaming = Streaming(make_layer(factory))
    whole = jitted(streaming.layer)(make_inputs(), mask=mask, segment_ids=SEGMENT_IDS)
    whole = helpers.leaves(whole)[0]
    real = np.ones_like(MASK) if mask is None else mask
    call, empty = jitted(streaming), streaming.get_initial_state(BATCH)
    _, final = run_pieces(call, empty, (TIME,), mask)
    assert helpers.leaves(final["segment_id"])[0].tolist() == [4, 4]
    for split in ((1,) * TIME, (7, 6), (2, 3, 4, 4)):
        chained, state = run_pieces(call, empty, split, mask)
        helpers.assert_close(chained[real], whole[real], LAYER_BOUND)
        assert state.keys() == final.keys()
        helpers.assert_close(helpers.leaves(state), helpers.leaves(final), LAYER_BOUND)


@LAYERS
def test_without_segments_a_call_goes_on_with_the_segment(factory: Callable) -> None:
    layer, inputs = make_layer(factory), make_inputs()
    ids = np.full((BATCH, 5), 3)
    whole = helpers.leaves(jitted(layer)(inputs))[0]
    empty, call_with_state = layer.get_initial_state(BATCH), jitted(layer.call_with_state)
    first, state = call_with_state(inputs[:, :5], empty, segment_ids=ids)
    second, state = call_with_state(inputs[:, 5:8], state)
    third, state = call_with_state(inputs[:, 8:], state, segment_ids=ids)
    chained = np.concatenate(helpers.leaves([first, second, third]), axis=1)
    helpers.assert_close(chained, whole, LAYER_BOUND)
    assert "segment_id" not in call_with_state(inputs, empty)[1]


@LAYERS
def test_a_masked_piece_keeps_the_state_whatever_its_ids(factory: Callable) -> None:
    layer, inputs = make_layer(factory), make_inputs()
    state, call_with_state = layer.get_initial_state(BATCH), jitted(layer.call_with_state)
    _, state = call_with_state(inputs, state, segment_ids=SEGMENT_IDS)
    none = np.zeros_like(MASK)
    _, after = call_with_state(inputs, state, mask=none, segment_ids=SEGMENT_IDS + 7)
    assert after.keys() == state.keys()
    for name in state:
        assert np.array_equal(*helpers.leaves([after[name], state[name]])), name


@LAYERS
def test_a_masked_piece_begins_no_segment(factory: Callable) -> None:
    layer, inputs = make_layer(factory), make_inputs()
    empty, call_with_state = layer.get_initial_state(BATCH), jitted(layer.call_with_state)
    ids, none = np.full((BATCH, 5), 3), np.zeros((BATCH, 5), bool)
    _, state = call_with_state(inputs[:, :5], empty)
    _, after = call_with_state(inputs[:, :5], state, mask=none, segment_ids=ids + 1)
    for segment_ids in (ids, ids + 1):
        expected, _ = call_with_state(inputs[:, 5:10], state, segment_ids=segment_ids)
        received, _ = call_with_state(inputs[:, 5:10], after, segment_ids=segment_ids)
        assert np.array_equal(*helpers.leaves([received, expected]))


@LAYERS
def test_no_output_depends_on_another_segment(factory: Callable) -> None:
    layer, inputs = make_layer(factory, "float32"), make_inputs("float32")
    changed = inputs.copy()
    changed[0, 1:7] += 50.0
    call = jitted(layer)
    before, after = (helpers.leaves(call(x, segment_ids=SEGMENT_IDS))[0] for x in (inputs, changed))
    assert np.array_equal(before[0, 7:], after[0, 7:]) and np.array_equal(before[1], after[1])
    assert (before[0, 1:7] != after[0, 1:7]).any(axis=1).all()


@LAYERS
def test_a_mask_of_an_embedding_arrives_beside_segments(factory: Callable) -> None:
    embedding = keras.layers.Embedding(5, WIDTH, mask_zero=True, dtype="float64")
    token_ids = np.where(MASK, SEGMENT_IDS % 4 + 1, 0)
    layer = make_layer(factory)
    embedded = embedding(token_ids)
    received = helpers.leaves(layer(embedded, segment_ids=SEGMENT_IDS))
    plain = helpers.leaves(embedded)[0]
    expected = helpers.leaves(layer(plain, mask=MASK, segment_ids=SEGMENT_IDS))
    helpers.assert_close(received, expected, 0.0)


@pytest.mark.long
@LAYERS
def test_a_saved_functional_model_of_unknown_sizes(factory: Callable, tmp_path: Path) -> None:
    layer = make_layer(factory, "float32")
    inputs = keras.Input((None, WIDTH), name="inputs")
    segment_ids = keras.Input((None,), dtype="int32", name="segment_ids")
    model = keras.Model([inputs, segment_ids], layer(inputs, segment_ids=segment_ids))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for rows, time in ((BATCH, TIME), (1, 1), (1, 10)):
        x, ids = make_inputs("float32")[:rows, :time], SEGMENT_IDS[:rows, :time]
        expected = helpers.leaves(jitted(layer)(x, segment_ids=ids))
        for each in (model, loaded):
            received = each.predict([x, ids], verbose=0)
            assert received.shape == (rows, time, WIDTH)
            helpers.assert_close([received], expected, 1e-5)


@LAYERS
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (SEGMENT_IDS[:, 1:], "Axis 1 of `segment_ids` has 12 elements"),
        (SEGMENT_IDS * 1.0, "`segment_ids` of .* expected integers, received float"),
    ],
)
def test_mistakes_are_explained(factory: Callable, wrong: np.ndarray, message: str) -> None:
    layer, inputs = make_layer(factory), make_inputs()
    with pytest.raises(ValueError, match=message):
        layer.call(inputs, segment_ids=wrong)
    with pytest.raises(ValueError, match=message):
        layer.call_with_state(inputs, layer.get_initial_state(BATCH), segment_ids=wrong)
    state = {**layer.get_initial_state(BATCH), "segment_id": SEGMENT_IDS[:, :2]}
    with pytest.raises(ValueError, match="`state segment_id` has 2 axes"):
        layer.call_with_state(inputs, state, segment_ids=SEGMENT_IDS)
