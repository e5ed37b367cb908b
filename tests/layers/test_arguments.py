"""Every constructor argument of every layer has an effect, is saved, and is checked."""

import inspect
from typing import Any

import keras
import numpy as np
import pytest

import elita_tf.layers
from elita_tf.layers import gated_linear_attention as gated_linear_attention_module
from tests import helpers
from tests.helpers import BATCH, TIME

WIDTH = 12
COMMON = {"kernel_initializer": "ones", "kernel_regularizer": "l2"}
# Per layer: the base arguments, and for every argument a value that must change something.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Attention2": (
        {"num_heads": 3, "context_length": 9, "decay": "learned"},
        {
            "num_heads": 2,
            "context_length": 17,
            "value_dim": 5,
            "position_dim": 7,
            "use_query": True,
            "decay": "gated",
            "half_lives": (2.0, 50.0),
            "logit_initializer": "ones",
            **COMMON,
        },
    ),
    "FeedForward2": ({}, {"inner_dim": 5, "rank": 3, "activation": "tanh", **COMMON}),
    "GatedFeedForward": ({}, {"inner_dim": 5, "activation": "tanh", **COMMON}),
    "GatedLinearAttention": (
        {"num_heads": 3},
        {
            "num_heads": 2,
            "key_dim": 5,
            "value_dim": 7,
            "gate_rank": 3,
            "gate_normalizer": 2.0,
            "chunk_size": 4,
            "gate": "scalar",
            "half_lives": (2.0, 50.0),
            **COMMON,
        },
    ),
    "CausalSelfAttention": (
        {"num_heads": 3, "window_length": 9},
        {"num_heads": 2, "window_length": 4, **COMMON},
    ),
}
CASES = [(name, argument) for name, (_, others) in ROWS.items() for argument in others]
NOT_SIZES = {
    "use_query",
    "activation",
    "decay",
    "gate",
    "gate_normalizer",
    "half_lives",
    "logit_initializer",
    "kernel_initializer",
    "kernel_regularizer",
}
BAD = [
    (name, argument, value)
    for name, argument in CASES
    for value in (0, -2, 2.5, "3", True)
    if argument not in NOT_SIZES
]


def make(name: str, **arguments: Any) -> keras.layers.Layer:
    return getattr(elita_tf.layers, name)(**{**ROWS[name][0], **arguments})


def behaviour(layer: keras.layers.Layer) -> tuple[list, list]:
    """Weights after a fixed seed, and outputs and losses with those weights."""
    keras.utils.set_random_seed(0)
    inputs = np.random.default_rng(3).standard_normal((BATCH, TIME, WIDTH)).astype("float32")
    layer.build(inputs.shape)
    return layer.get_weights(), helpers.leaves([helpers.jitted(layer)(inputs), *layer.losses])


def differs(first: list, second: list) -> bool:
    if [x.shape for x in first] != [x.shape for x in second]:
        return True
    return any(helpers.relative_error(x, y) > 1e-5 for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "name", sorted(set(elita_tf.layers.__all__) - {"Streaming", "SequenceMixer"})
)
def test_every_argument_has_a_row(name: str) -> None:
    parameters = inspect.signature(getattr(elita_tf.layers, name).__init__).parameters
    assert set(ROWS[name][1]) == set(parameters) - {"self", "kwargs"}


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_argument_has_an_effect(name: str, argument: str, monkeypatch: Any) -> None:
    value = ROWS[name][1][argument]
    if argument == "chunk_size":  # A matter of speed only: it must reach the op.
        received = []
        original = gated_linear_attention_module.gated_linear_attention

        def spy(*tensors: Any, **options: Any) -> Any:
            received.append(options["chunk_size"])
            return original(*tensors, **options)

        monkeypatch.setattr(gated_linear_attention_module, "gated_linear_attention", spy)
        behaviour(make(name, chunk_size=value))
        assert received == [value]
        return
    weights, outputs = behaviour(make(name))
    other_weights, other_outputs = behaviour(make(name, **{argument: value}))
    assert differs(weights, other_weights) or differs(outputs, other_outputs)


@pytest.mark.parametrize("name", ROWS)
def test_regularizer_reaches_every_kernel(name: str) -> None:
    layer = make(name, kernel_regularizer="l2")
    weights, (_, *losses) = behaviour(layer)
    # Matrices are what is not a bias, a norm or part of Attention2's sines.
    exempt = ("bias", "gamma", "beta", "frequency", "phase", "readout")
    pairs = zip(layer.weights, weights, strict=True)
    expected = [
        0.01 * np.sum(value**2) for weight, value in pairs if not weight.path.endswith(exempt)
    ]
    assert sorted(losses) == pytest.approx(sorted(expected), rel=1e-5)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_config_round_trip(name: str, argument: str) -> None:
    layer = make(name, **{argument: ROWS[name][1][argument]}, dtype="mixed_bfloat16")
    copy = type(layer).from_config(layer.get_config())
    assert copy.get_config() == layer.get_config()
    assert argument in layer.get_config()
    assert layer.get_config() != make(name, dtype="mixed_bfloat16").get_config()
    first, second = behaviour(layer), behaviour(copy)
    assert not differs(first[0], second[0]) and not differs(first[1], second[1])


def test_streaming_config_round_trip() -> None:
    layer = make("Attention2", use_query=True)
    streaming = elita_tf.layers.Streaming(layer, name="stream")
    copy = elita_tf.layers.Streaming.from_config(streaming.get_config())
    assert copy.get_config() == streaming.get_config()
    assert copy.layer.get_config() == layer.get_config()


@pytest.mark.parametrize("name", ROWS)
def test_registered_for_loading(name: str) -> None:
    cls = getattr(elita_tf.layers, name)
    assert keras.saving.get_registered_object(f"elita_tf>{name}") is cls


@pytest.mark.parametrize(("name", "argument", "value"), BAD)
def test_a_bad_size_is_named(name: str, argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"`{argument}`.*{name}.*{value!r}"):
        make(name, **{argument: value})


@pytest.mark.parametrize("name", ROWS)
def test_a_misspelt_argument_is_named_with_the_nearest(name: str) -> None:
    keras_arguments = ("name", "dtype", "trainable", "autocast", "activity_regularizer")
    for argument in (*ROWS[name][1], *keras_arguments):
        wrong = argument[:-1]
        message = rf"{name} has no argument `{wrong}` \(did you mean `{argument}`\?\)"
        with pytest.raises(ValueError, match=message):
            getattr(elita_tf.layers, name)(**ROWS[name][0], **{wrong: None})
    with pytest.raises(ValueError, match="has no argument `zzz`, `num_head.*It takes: .*name"):
        make(name, zzz=1, num_headd=2)


def test_a_misspelt_argument_of_streaming_is_named() -> None:
    layer = make("GatedLinearAttention")
    with pytest.raises(ValueError, match=r"Streaming has no argument `nam` \(did you mean `name`"):
        elita_tf.layers.Streaming(layer, nam="stream")


@pytest.mark.parametrize("name", ROWS)
def test_the_arguments_of_keras_are_taken_and_saved(name: str) -> None:
    cls, arguments = getattr(elita_tf.layers, name), dict(ROWS[name][0])
    arguments |= {"name": "x", "dtype": "float64", "trainable": False, "autocast": False}
    layer = cls(**arguments, activity_regularizer="l2")
    copy = type(layer).from_config(layer.get_config())
    assert (copy.name, copy.compute_dtype, copy.trainable) == ("x", "float64", False)
    assert layer.autocast is False and layer.activity_regularizer is not None


@pytest.mark.parametrize("name", sorted(set(elita_tf.layers.__all__)))
def test_build_takes_one_shape_for_every_tensor_of_a_call(name: str) -> None:
    cls = getattr(elita_tf.layers, name)
    tensors = set(inspect.signature(cls.call).parameters) - {"self", "mask"}
    shapes = set(inspect.signature(cls.build).parameters) - {"self"}
    assert shapes == {f"{tensor}_shape" for tensor in tensors}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_bad_gate_normalizer_is_named(value: float) -> None:
    with pytest.raises(ValueError, match=rf"`gate_normalizer`.*{value!r}"):
        make("GatedLinearAttention", gate_normalizer=value)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("argument", ["activation", "kernel_initializer", "kernel_regularizer"])
def test_an_unknown_name_is_refused(name: str, argument: str) -> None:
    if argument in ROWS[name][1]:
        with pytest.raises(ValueError, match="nonsense"):
            make(name, **{argument: "nonsense"})
