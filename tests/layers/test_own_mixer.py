"""A user's own mixer, written through the public interface alone, is a layer like the others."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf import layers, ops
from tests import helpers
from tests.helpers import BATCH, LAYER_BOUND, TIME, jitted, randomized

WIDTH = 6
SEGMENT_IDS = np.array([[3] * 5 + [1] * 8, [2] + [4] * 9 + [5] * 3])
# Padding on the left and on the right.
SIDES = {"left": (range(4, TIME), range(9, TIME)), "right": (range(9), range(4))}


@keras.saving.register_keras_serializable(package="tests.layers")
class MovingAverage(layers.SequenceMixer):
    """average_t = a average_{t-1} + (1 - a) x_t, with a learned a for every feature; y = W average.

    It is gated linear attention with one feature in every head.
    """

    masked_terms = {"key": 0.0, "log_decay": 0.0}

    def __init__(self, start: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.start = start

    def create_weights(self, inputs_shape: tuple) -> None:
        start = keras.initializers.Constant(self.start)
        self.gate = self.add_weight((self.hidden_dim, 1), start, name="gate", autocast=False)
        self.output_projection = keras.layers.Dense(self.hidden_dim, dtype=self.dtype_policy)
        self.output_projection.build(inputs_shape)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"average": (self.hidden_dim, 1, 1)}

    def make_terms(self, inputs: Any, positions: Any, mask: Any) -> dict[str, Any]:
        value = keras.ops.cast(inputs, self.state_dtype)[..., None]
        log_decay = keras.ops.log_sigmoid(keras.ops.cast(self.gate, self.state_dtype))
        log_decay = log_decay + keras.ops.zeros_like(value)
        query, key = keras.ops.ones_like(value), 1.0 - keras.ops.exp(log_decay)
        return {"query": query, "key": key, "value": value, "log_decay": log_decay}

    def run_step(self, terms: dict, state: dict) -> tuple[Any, dict]:
        outputs, average = ops.gated_linear_attention_step(**terms, state=state["average"])
        return outputs[..., 0], {"average": average}

    def run_sequence(self, terms: dict, state: dict | None, segment_ids: Any) -> tuple[Any, dict]:
        initial = state and state["average"]
        outputs, average = ops.gated_linear_attention(
            **terms, initial_state=initial, segment_ids=segment_ids
        )
        return outputs[..., 0], {"average": average}


def make_layer(dtype: str = "float64") -> MovingAverage:
    layer = MovingAverage(dtype=dtype)
    layer.build((None, None, WIDTH))
    return randomized(layer)


def make_inputs(dtype: str = "float64", rows: int = BATCH) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((rows, TIME, WIDTH)).astype(dtype)


def loop(layer: MovingAverage, inputs: np.ndarray) -> np.ndarray:
    """The definition, for rows (time, hidden) without padding and segments."""
    gate, kernel, bias = (np.asarray(x, "float64") for x in layer.get_weights())
    decay, average, rows = 1.0 / (1.0 + np.exp(-gate[:, 0])), np.zeros(WIDTH), []
    for x in inputs:
        average = decay * average + (1.0 - decay) * x
        rows.append(average @ kernel + bias)
    return np.array(rows)


def test_a_call_is_the_loop() -> None:
    layer, inputs = make_layer(), make_inputs()
    expected = np.stack([loop(layer, row) for row in inputs])
    helpers.assert_close(helpers.leaves(jitted(layer)(inputs)), [expected], LAYER_BOUND)


@pytest.mark.parametrize("rows", SIDES.values(), ids=SIDES)
def test_padding_changes_nothing(rows: tuple) -> None:
    layer, inputs = make_layer(), make_inputs()
    mask = np.zeros((BATCH, TIME), "bool")
    for row, places in enumerate(rows):
        mask[row, list(places)] = True
    inputs[~mask] = np.nan
    called = helpers.leaves(jitted(layer)(inputs, mask=mask))[0]
    empty = layer.get_initial_state(BATCH)
    outputs, state = jitted(layer.call_with_state)(inputs, empty, mask=mask)
    for row, places in enumerate(rows):
        alone = inputs[row, list(places)]
        for result in (called, helpers.leaves(outputs)[0]):
            helpers.assert_close([result[row, mask[row]]], [loop(layer, alone)], LAYER_BOUND)
        _, final = layer.call_with_state(alone[None], layer.get_initial_state(1))
        received = helpers.leaves(state["average"])[0][row : row + 1]
        helpers.assert_close([received], helpers.leaves(final), LAYER_BOUND)


def test_segments_are_separate_calls() -> None:
    layer, inputs = make_layer(), make_inputs()
    outputs = helpers.leaves(jitted(layer)(inputs, segment_ids=SEGMENT_IDS))[0]
    for row, ids in enumerate(SEGMENT_IDS):
        for number in np.unique(ids):
            places = ids == number
            expected = loop(layer, inputs[row, places])
            helpers.assert_close([outputs[row, places]], [expected], LAYER_BOUND)


@pytest.mark.parametrize("split", [(1,) * TIME, (6, 7), (2, 10, 1)], ids=str)
@pytest.mark.parametrize("segment_ids", [None, SEGMENT_IDS], ids=["one", "segments"])
def test_streaming_is_the_whole(split: tuple, segment_ids: np.ndarray | None) -> None:
    streaming, inputs = layers.Streaming(make_layer()), make_inputs()
    whole = helpers.leaves(jitted(streaming.layer)(inputs, segment_ids=segment_ids))[0]
    call, state, start, pieces = jitted(streaming), streaming.get_initial_state(BATCH), 0, []
    for length in split:
        piece = np.s_[:, start : start + length]
        ids = None if segment_ids is None else segment_ids[piece]
        outputs, state = call(inputs[piece], state, segment_ids=ids)
        pieces.append(helpers.leaves(outputs)[0])
        start += length
    helpers.assert_close(np.concatenate(pieces, axis=1), whole, LAYER_BOUND)


def make_model(layer: MovingAverage) -> keras.Model:
    inputs = keras.Input((None, WIDTH), name="inputs")
    return keras.Model(inputs, layer(inputs))


@pytest.mark.long
def test_fit_and_the_keras_file(tmp_path: Path) -> None:
    keras.utils.set_random_seed(5)
    model, inputs = make_model(MovingAverage(start=0.5)), make_inputs("float32", rows=8)
    targets = helpers.leaves(make_layer("float32")(inputs))[0]
    before = [weight.copy() for weight in model.get_weights()]
    model.compile(keras.optimizers.Adam(3e-2), "mse")
    losses = model.fit(inputs, targets, batch_size=4, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    pairs = zip(before, model.get_weights(), strict=True)
    assert all(not np.array_equal(old, new) for old, new in pairs)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].start == 0.5
    expected = helpers.leaves(jitted(model)(inputs))
    helpers.assert_close(helpers.leaves(jitted(loaded)(inputs)), expected, 0.0)


def test_mixed_precision_keeps_the_state_precise() -> None:
    layer = make_layer("mixed_bfloat16")
    empty, inputs = layer.get_initial_state(BATCH), make_inputs("float32")
    outputs, state = layers.Streaming(layer)(inputs, empty)
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    for each in (empty, state):
        assert keras.backend.standardize_dtype(each["average"].dtype) == "float32"
    exact = helpers.leaves(make_layer("float32")(inputs))
    helpers.assert_close(helpers.leaves(outputs), exact, 3e-2)


@helpers.tensorflow_only
def test_saved_model(tmp_path: Path) -> None:
    import tensorflow as tf

    model, inputs = make_model(make_layer("float32")), make_inputs("float32")
    model.export(tmp_path / "model", verbose=False)
    served = tf.saved_model.load(tmp_path / "model")
    received, expected = served.serve(tf.constant(inputs)), model(inputs)
    helpers.assert_close(helpers.leaves(received), helpers.leaves(expected), 1e-5)


def test_mistakes_are_explained() -> None:
    with pytest.raises(ValueError, match=r"MovingAverage .*`strat` \(did you mean `start`\?\)"):
        MovingAverage(strat=2.0)
    layer = MovingAverage()
    with pytest.raises(ValueError, match="not built"):
        layer.get_initial_state(BATCH)
    layer.build((None, None, WIDTH))
    with pytest.raises(ValueError, match=rf"received inputs \({BATCH}, {TIME}, {WIDTH + 1}\)"):
        layer(np.ones((BATCH, TIME, WIDTH + 1)))
    with pytest.raises(ValueError, match=r"is a dict of \['average'\]"):
        layer.call_with_state(make_inputs("float32"), {"mean": np.zeros((BATCH, WIDTH, 1, 1))})
