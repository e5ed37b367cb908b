"""What every layer with a state promises: chaining, masks, causality and the state's form."""

from collections.abc import Callable

import keras
import numpy as np
import pytest

from elita_tf.layers import CausalSelfAttention
from tests import helpers
from tests.helpers import (
    BATCH,
    LAYER_BOUND,
    TIME,
    jitted,
    randomized,
)
from tests.mixers import MIXERS, WIDTH

FACTORIES = MIXERS
LAYERS = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
SPLITS = [(TIME,), (1,) * TIME, (5, 8), (1, 4, 7, 1)]
# (real positions of row 0, of row 1) out of TIME: padding on the left, on the right, and holes.
MASKS = {
    "left": (range(4, TIME), range(9, TIME)),
    "right": (range(9), range(4)),
    "both": (range(2, 9), range(4, 11)),
    "holes": ([0, 1, 4, 5, 6, 11], [2, 3, 8, 12]),
    "one row full": (range(TIME), range(3)),
}


def make_layer(factory: Callable, dtype: str = "float64") -> keras.layers.Layer:
    layer = factory(dtype=dtype)
    layer.build((None, None, WIDTH))
    return randomized(layer, scale=0.3)


def make_inputs(time: int = TIME, dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(3).standard_normal((BATCH, time, WIDTH)).astype(dtype)


def mask_of(rows: tuple) -> np.ndarray:
    mask = np.zeros((len(rows), TIME), "bool")
    for row, positions in enumerate(rows):
        mask[row, list(positions)] = True
    return mask


def numpy_state(state: dict) -> dict:
    return dict(zip(state, helpers.leaves(list(state.values())), strict=True))


def assert_same_state(actual: dict, expected: dict, bound: float = LAYER_BOUND) -> None:
    assert actual.keys() == expected.keys()
    helpers.assert_close(helpers.leaves(actual), helpers.leaves(expected), bound)


@LAYERS
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_pieces_chained_through_the_state_are_the_whole(factory: Callable, split: tuple) -> None:
    layer, inputs = make_layer(factory), make_inputs()
    call_with_state = jitted(layer.call_with_state)
    state, pieces, start = layer.get_initial_state(BATCH), [], 0
    for length in split:
        outputs, state = call_with_state(inputs[:, start : start + length], state)
        pieces.append(helpers.leaves(outputs)[0])
        start += length
    expected = helpers.leaves(jitted(layer)(inputs))[0]
    helpers.assert_close(np.concatenate(pieces, axis=1), expected, LAYER_BOUND)
    whole = call_with_state(inputs, layer.get_initial_state(BATCH))[1]
    assert_same_state(state, whole)


@LAYERS
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_masked_positions_take_no_part(factory: Callable, rows: tuple) -> None:
    layer, inputs, mask = make_layer(factory), make_inputs(), mask_of(rows)
    inputs[~mask] = 1e3
    call_with_state = jitted(layer.call_with_state)
    outputs, state = call_with_state(inputs, layer.get_initial_state(BATCH), mask=mask)
    outputs, state = helpers.leaves(outputs)[0], numpy_state(state)
    called = helpers.leaves(jitted(layer)(inputs, mask=mask))[0]
    helpers.assert_finite([called, outputs])
    for row, positions in enumerate(rows):
        alone = inputs[row : row + 1, list(positions)]
        expected, final = call_with_state(alone, layer.get_initial_state(1))
        expected = helpers.leaves(expected)[0][0]
        for result in (called, outputs):
            helpers.assert_close([result[row, list(positions)]], [expected], LAYER_BOUND)
        assert_same_state({name: leaf[row : row + 1] for name, leaf in state.items()}, final)


@LAYERS
def test_masks_between_chained_pieces(factory: Callable) -> None:
    layer, inputs, mask = make_layer(factory), make_inputs(), mask_of(MASKS["holes"])
    call_with_state = jitted(layer.call_with_state)
    whole, final = call_with_state(inputs, layer.get_initial_state(BATCH), mask=mask)
    state, pieces = layer.get_initial_state(BATCH), []
    for piece in (slice(0, 3), slice(3, 4), slice(4, 12), slice(12, TIME)):
        outputs, state = call_with_state(inputs[:, piece], state, mask=mask[:, piece])
        pieces.append(helpers.leaves(outputs)[0])
    chained = np.concatenate(pieces, axis=1)
    helpers.assert_close(chained[mask], helpers.leaves(whole)[0][mask], LAYER_BOUND)
    assert_same_state(state, final)


@LAYERS
def test_a_fully_masked_row_keeps_its_state(factory: Callable) -> None:
    layer, inputs = make_layer(factory), make_inputs()
    call_with_state = jitted(layer.call_with_state)
    state = call_with_state(inputs, layer.get_initial_state(BATCH))[1]
    mask = np.stack([np.zeros(TIME, "bool"), np.ones(TIME, "bool")])
    for before in (state, layer.get_initial_state(BATCH)):
        outputs, after = call_with_state(inputs, before, mask=mask)
        helpers.assert_finite(helpers.leaves(outputs))
        states = numpy_state(after), numpy_state(before)
        first = [{name: leaf[:1] for name, leaf in each.items()} for each in states]
        assert_same_state(*first, bound=0.0)


@LAYERS
def test_gradients_past_masks_are_finite(factory: Callable) -> None:
    layer, inputs, mask = make_layer(factory), make_inputs(), mask_of(MASKS["both"])
    mask[0] = False
    cotangent = np.where(mask[..., None], make_inputs(), 0.0)
    result = helpers.vjp(lambda x: layer(x, mask=mask), [inputs], [cotangent])
    helpers.assert_finite([*result.outputs, *result.gradients])
    assert not result.gradients[0][~mask].any()
    assert result.gradients[0][mask].all()


@LAYERS
def test_a_nan_at_a_masked_position_has_no_influence(factory: Callable) -> None:
    layer, inputs, mask = make_layer(factory), make_inputs(), mask_of(MASKS["holes"])
    weights = [variable.value for variable in layer.trainable_variables]
    constants = [variable.value for variable in layer.non_trainable_variables]
    cotangent = np.where(mask[..., None], inputs, 0.0)

    def call(x: np.ndarray, weights: list) -> np.ndarray:
        outputs, _ = layer.stateless_call(weights, constants, x, mask=mask)
        return keras.ops.where(mask[..., None], outputs, 0.0)

    def streamed(x: np.ndarray) -> list[np.ndarray]:
        outputs, state = jitted(layer.call_with_state)(x, layer.get_initial_state(BATCH), mask=mask)
        return [helpers.leaves(outputs)[0][mask], *helpers.leaves(state)]

    spoilt = np.where(mask[..., None], inputs, np.nan)
    expected, received = (helpers.vjp(call, [x, weights], [cotangent]) for x in (inputs, spoilt))
    helpers.assert_finite([*received.outputs, *received.gradients])
    helpers.assert_close(received, expected, 0.0)
    helpers.assert_close(streamed(spoilt), streamed(inputs), 0.0)


@LAYERS
@pytest.mark.filterwarnings("error:Layer .* destroy the mask")
def test_a_mask_of_an_embedding_arrives(factory: Callable) -> None:
    token_ids = np.array([[0, 0, 3, 1, 2], [4, 2, 1, 0, 0]])
    embedding = keras.layers.Embedding(5, WIDTH, mask_zero=True, dtype="float64")
    layer = make_layer(factory)
    embedded = embedding(token_ids)
    outputs = helpers.leaves(layer(embedded))
    expected = layer(helpers.leaves(embedded)[0], mask=token_ids != 0)
    helpers.assert_close(outputs, helpers.leaves(expected), 0.0)


@LAYERS
@pytest.mark.parametrize("position", [1, 4, 8, 12])
def test_no_output_depends_on_a_later_position(factory: Callable, position: int) -> None:
    layer, inputs = make_layer(factory, "float32"), make_inputs(dtype="float32")
    changed = inputs.copy()
    changed[:, position] += 50.0
    call = jitted(layer)
    before, after = helpers.leaves([call(inputs), call(changed)])
    assert np.array_equal(before[:, :position], after[:, :position])
    assert not np.array_equal(before[:, position], after[:, position])


@LAYERS
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16", "float64"])
def test_state_is_a_flat_dict_with_the_batch_first(factory: Callable, dtype: str) -> None:
    layer = make_layer(factory, dtype)
    empty = layer.get_initial_state(BATCH)
    # NumPy in, as a server would send it, and outside of __call__.
    fed = numpy_state(empty)
    inputs = make_inputs(dtype="float64" if dtype == "float64" else "float32")
    _, state = layer.call_with_state(inputs, fed)
    for each in (empty, state):
        assert isinstance(each, dict)
        assert all(leaf.shape[0] == BATCH for leaf in each.values())
    shapes = [[tuple(leaf.shape) for leaf in each.values()] for each in (empty, state)]
    dtypes = [[leaf.dtype for leaf in each.values()] for each in (empty, state)]
    assert shapes[0] == shapes[1] and dtypes[0] == dtypes[1]
    floating = {keras.backend.standardize_dtype(d) for d in dtypes[0]} - {"int32"}
    keeps_keys = isinstance(layer, CausalSelfAttention) and dtype == "mixed_bfloat16"
    precise = "float64" if dtype == "float64" else "float32"
    assert floating == {"bfloat16" if keeps_keys else precise}


@LAYERS
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_call_is_the_same_inside_and_outside_of_keras(factory: Callable, dtype: str) -> None:
    layer, inputs = make_layer(factory, dtype), make_inputs(dtype="float32")
    empty = layer.get_initial_state(BATCH)
    # Inside __call__, Keras casts raw weights to the compute dtype unless told otherwise.
    inside, outside = layer(inputs), layer.call_with_state(inputs, empty)[0]
    # The state's empty slots change the blocks of softmax's sums, and so bfloat16's last bit.
    rounds = dtype == "mixed_bfloat16" and isinstance(layer, CausalSelfAttention)
    bound = 4e-3 if rounds else 1e-6
    helpers.assert_close(helpers.leaves(inside), helpers.leaves(outside), bound)


@LAYERS
def test_mistakes_with_the_state_are_explained(factory: Callable) -> None:
    layer = factory()
    with pytest.raises(ValueError, match=rf"{layer.name}.*not built"):
        layer.get_initial_state(BATCH)
    with pytest.raises(ValueError, match=rf"{layer.name}.*not built"):
        layer.call_with_state(make_inputs(), {})
    layer.build((None, None, WIDTH))
    with pytest.raises(ValueError, match="past_keys"):
        layer.call_with_state(make_inputs(), {"past_keys": np.zeros(BATCH)})
    with pytest.raises(ValueError, match="tuple"):
        layer.call_with_state(make_inputs(), tuple(layer.get_initial_state(BATCH).values()))
