"""Every public layer in every way that Keras users run a layer.

A row maps a dict of arrays to a dict of tensors, so that Streaming fits in with the others, and
SavedModel signatures are flat.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf import layers
from tests import helpers
from tests.helpers import BATCH, HEADS, TIME, jitted
from tests.mixers import MAIN, WIDTH

FACTORIES: dict[str, Callable[..., keras.layers.Layer]] = {
    **MAIN,
    "FeedForward2": lambda **k: layers.FeedForward2(8, 3, **k),
    "GatedFeedForward": lambda **k: layers.GatedFeedForward(8, **k),
    "Streaming": lambda **k: layers.Streaming(layers.GatedLinearAttention(HEADS, **k)),
}
EVERY_LAYER = pytest.mark.parametrize("name", FACTORIES)


def make_layer(name: str, dtype: str = "float32") -> keras.layers.Layer:
    keras.utils.set_random_seed(5)
    layer = FACTORIES[name](dtype=dtype)
    layer.build((None, None, WIDTH))
    return layer


def make_inputs(layer: keras.layers.Layer, batch: int = BATCH, time: int = TIME) -> dict:
    rng = np.random.default_rng(batch * time)
    inputs = {"inputs": rng.standard_normal((batch, time, WIDTH)).astype("float32")}
    if isinstance(layer, layers.Streaming):
        state = layer.get_initial_state(batch)
        inputs |= {
            name: rng.standard_normal(x.shape).astype("float32") for name, x in state.items()
        }
    return {name: keras.ops.convert_to_tensor(x) for name, x in inputs.items()}


def run(layer: keras.layers.Layer, inputs: dict) -> dict:
    if not isinstance(layer, layers.Streaming):
        return {"outputs": layer(inputs["inputs"])}
    state = {name: x for name, x in inputs.items() if name != "inputs"}
    outputs, state = layer(inputs["inputs"], state)
    return {"outputs": outputs, **state}


def make_model(layer: keras.layers.Layer) -> keras.Model:
    """The layer as a functional model of unknown batch and time."""
    shapes = {name: tuple(x.shape[1:]) for name, x in make_inputs(layer).items()}
    shapes["inputs"] = (None, WIDTH)
    symbolic = {name: keras.Input(shape, name=name) for name, shape in shapes.items()}
    return keras.Model(symbolic, run(layer, symbolic))


def assert_same(actual: Any, expected: Any, bound: float = 1e-5) -> None:
    helpers.assert_close(helpers.leaves(actual), helpers.leaves(expected), bound)


def test_every_public_layer_has_a_row() -> None:
    public = {value for value in vars(layers).values() if isinstance(value, type)}
    assert public == {getattr(layers, name) for name in layers.__all__}
    # The base class computes nothing by itself: tests/layers/test_own_mixer.py has one that does.
    assert {type(make()) for make in FACTORIES.values()} == public - {layers.SequenceMixer}


@EVERY_LAYER
def test_eager(name: str) -> None:
    layer = make_layer(name)
    inputs = make_inputs(layer)
    outputs = run(layer, inputs)["outputs"]
    assert tuple(outputs.shape) == (BATCH, TIME, WIDTH)
    if name != "Streaming":
        assert layer.compute_output_shape((BATCH, None, WIDTH)) == (BATCH, None, WIDTH)
    helpers.assert_finite(helpers.leaves(outputs))
    other = run(layer, make_inputs(layer, time=TIME + 1))["outputs"]
    assert helpers.leaves(outputs)[0].std() > 0 and tuple(other.shape)[1] == TIME + 1


@helpers.tensorflow_only
@EVERY_LAYER
def test_graph_of_unknown_batch_and_time(name: str) -> None:
    import tensorflow as tf

    layer = make_layer(name)
    specs = {
        key: tf.TensorSpec([None, None, WIDTH] if key == "inputs" else [None, *x.shape[1:]])
        for key, x in make_inputs(layer).items()
    }
    traced = tf.function(lambda inputs: run(layer, inputs), input_signature=[specs])
    for batch, time in ((BATCH, TIME), (1, 1), (5, 6)):
        inputs = make_inputs(layer, batch, time)
        assert_same(traced(inputs), run(layer, inputs))


@EVERY_LAYER
def test_functional_model_of_unknown_batch_and_time(name: str) -> None:
    layer = make_layer(name)
    model = make_model(layer)
    for batch, time in ((BATCH, TIME), (1, 1), (5, 6)):
        inputs = make_inputs(layer, batch, time)
        assert_same(jitted(model)(inputs), jitted(partial(run, layer))(inputs))


@EVERY_LAYER
def test_compiled_by_xla_with_gradients(name: str) -> None:
    layer = make_layer(name)
    inputs = make_inputs(layer)
    cotangents = helpers.random_like(helpers.leaves(jitted(partial(run, layer))(inputs)))

    def function(*values: Any) -> dict:
        return run(layer, dict(zip(inputs, values, strict=True)))

    eager = helpers.vjp(function, list(inputs.values()), cotangents, helpers.eager)
    compiled = helpers.vjp(function, list(inputs.values()), cotangents, helpers.xla)
    helpers.assert_close(compiled, eager, 3e-5)
    assert all(gradient.any() for gradient in eager.gradients)


@EVERY_LAYER
def test_mixed_bfloat16(name: str) -> None:
    layer, mixed = make_layer(name), make_layer(name, "mixed_bfloat16")
    inputs = make_inputs(layer)
    outputs = jitted(partial(run, mixed))(inputs)["outputs"]
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert {weight.dtype for weight in mixed.weights} == {"float32"}
    assert_same(outputs, jitted(partial(run, layer))(inputs)["outputs"], 3e-2)


@EVERY_LAYER
def test_keras_file(name: str, tmp_path: Path) -> None:
    layer = make_layer(name)
    model, inputs = make_model(layer), make_inputs(layer)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(jitted(loaded)(inputs), jitted(model)(inputs), 0.0)
    configs = [
        json.dumps([x.get_config() for x in each.layers if type(x) is type(layer)])
        for each in (model, loaded)
    ]
    assert f'"name": "{layer.name}"' in configs[0] and configs[0] == configs[1]


@pytest.mark.long
@helpers.tensorflow_only
@EVERY_LAYER
def test_saved_model(name: str, tmp_path: Path) -> None:
    import tensorflow as tf

    layer = make_layer(name)
    model = make_model(layer)
    model.export(tmp_path / "model", verbose=False)
    served = tf.saved_model.load(tmp_path / "model")
    for batch, time in ((BATCH, TIME), (5, 6)):
        inputs = make_inputs(layer, batch, time)
        assert_same(served.serve(inputs), model(inputs))


@EVERY_LAYER
def test_fit(name: str) -> None:
    layer = make_layer(name)
    model = make_model(layer)
    model = keras.Model(model.inputs, model.output["outputs"])
    inputs = [make_inputs(layer, 8)[tensor.name] for tensor in model.inputs]
    targets = jitted(partial(run, make_layer(name)))(make_inputs(layer, 8))["outputs"] * 0.5
    before = [weight.copy() for weight in layer.get_weights()]
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    losses = model.fit(inputs, targets, batch_size=4, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    moved = [not np.array_equal(*pair) for pair in zip(before, layer.get_weights(), strict=True)]
    assert all(moved), [w.path for w, m in zip(layer.weights, moved, strict=True) if not m]
