"""Streaming: a layer whose state goes through inputs and outputs."""

import keras
import numpy as np
import pytest

from elita_tf.layers import Streaming
from tests import helpers
from tests.helpers import BATCH, LAYER_BOUND, TIME, jitted, randomized
from tests.mixers import MAIN, WIDTH

FACTORIES = MAIN
LAYERS = pytest.mark.parametrize("make_layer", FACTORIES.values(), ids=FACTORIES)


def make_streaming(make_layer, dtype: str = "float64") -> Streaming:
    layer = make_layer(dtype=dtype)
    layer.build((None, None, WIDTH))
    return Streaming(randomized(layer, scale=0.3))


def make_inputs(dtype: str = "float64") -> np.ndarray:
    return np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH)).astype(dtype)


@LAYERS
@pytest.mark.parametrize("split", [(1,) * TIME, (6, 7), (2, 10, 1)], ids=str)
def test_pieces_are_the_whole(make_layer, split: tuple[int, ...]) -> None:
    streaming, inputs = make_streaming(make_layer), make_inputs()
    call = jitted(streaming)
    state, pieces, start = streaming.get_initial_state(BATCH), [], 0
    for length in split:
        outputs, state = call(inputs[:, start : start + length], state)
        pieces.append(helpers.leaves(outputs)[0])
        start += length
    whole = helpers.leaves(jitted(streaming.layer)(inputs))[0]
    helpers.assert_close(np.concatenate(pieces, axis=1), whole, LAYER_BOUND)


@LAYERS
def test_masked_pieces(make_layer) -> None:
    streaming, inputs = make_streaming(make_layer), make_inputs()
    mask = np.random.default_rng(0).random((BATCH, TIME)) < 0.6
    state, pieces = streaming.get_initial_state(BATCH), []
    for piece in (slice(0, 5), slice(5, TIME)):
        outputs, state = jitted(streaming)(inputs[:, piece], state, mask=mask[:, piece])
        pieces.append(helpers.leaves(outputs)[0])
    whole = helpers.leaves(jitted(streaming.layer)(inputs, mask=mask))[0]
    helpers.assert_close(np.concatenate(pieces, axis=1)[mask], whole[mask], LAYER_BOUND)


@LAYERS
def test_state_is_not_cast_under_mixed_precision(make_layer) -> None:
    streaming = make_streaming(make_layer, "mixed_bfloat16")
    empty = streaming.get_initial_state(BATCH)
    direct = streaming.layer.call_with_state(make_inputs("float32"), empty)
    streamed = streaming(make_inputs("float32"), empty)
    before = [keras.backend.standardize_dtype(leaf.dtype) for leaf in empty.values()]
    after = [keras.backend.standardize_dtype(leaf.dtype) for leaf in streamed[1].values()]
    assert before == after
    helpers.assert_close(helpers.leaves(streamed), helpers.leaves(direct), 0.0)


@LAYERS
def test_in_a_functional_model_of_unknown_length(make_layer) -> None:
    streaming, inputs = make_streaming(make_layer), make_inputs()
    state = streaming.get_initial_state(BATCH)
    symbolic = {
        name: keras.Input(tuple(leaf.shape[1:]), dtype=leaf.dtype, name=name)
        for name, leaf in state.items()
    }
    x = keras.Input((None, WIDTH), dtype="float64", name="x")
    model = keras.Model([x, symbolic], streaming(x, symbolic))
    expected = helpers.leaves(jitted(streaming)(inputs, state))
    outputs = jitted(model)([keras.ops.convert_to_tensor(inputs), state])
    helpers.assert_close(helpers.leaves(outputs), expected, LAYER_BOUND)


@LAYERS
def test_weights_are_those_of_the_layer(make_layer) -> None:
    streaming = make_streaming(make_layer)
    streaming(make_inputs(), streaming.get_initial_state(BATCH))
    assert [id(w) for w in streaming.weights] == [id(w) for w in streaming.layer.weights]


@LAYERS
def test_an_unbuilt_layer_is_built_by_the_first_inputs(make_layer) -> None:
    streaming = Streaming(make_layer())
    with pytest.raises(ValueError, match="not built"):
        streaming.get_initial_state(BATCH)
    streaming.build((None, None, WIDTH))
    outputs, _ = streaming(make_inputs("float32"), streaming.get_initial_state(BATCH))
    assert tuple(outputs.shape) == (BATCH, TIME, WIDTH)


def test_a_layer_without_a_state_is_refused() -> None:
    with pytest.raises(ValueError, match="Dense"):
        Streaming(keras.layers.Dense(3))
