"""Keras' and KerasHub's own tests of layers, backbones, tasks and preprocessors, on ours.

Both harnesses are in the installed packages, though they are not public. What is left out, and why:

* KerasHub's checks of precision, for what has a forget gate: they want every weight in the policy's
  dtype, and the bias that holds a half-life is float32 under every policy. In bfloat16 a half-life
  of 65,536 positions would change by 3 %. `tests/layers` has our own tests of precision.
* `run_preprocessor_test`, which fails for every class: it reads `self.init_kwargs`, which its
  `TestCase` does not have. The test that it begins with is run instead.
* A part of `run_task_test`: a preprocessor is to give every input of the model, and ours gives no
  `segment_ids`. They are optional, and a text of a row of its own is one segment: ids would say
  nothing, and cost time in every step. The test below looks at what the part is for, that the
  inputs have all that is given, and no other names.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf import layers
from elita_tf.models import (
    ElitaBackbone,
    ElitaCausalLM,
    ElitaCausalLMPreprocessor,
    architectures,
)
from tests import helpers

testing = pytest.importorskip("keras.src.testing")
hub = pytest.importorskip("keras_hub.src.tests.test_case", reason="needs the package grain")

pytestmark = pytest.mark.long
BATCH, TIME, WIDTH = 2, 13, 12
SHAPE = (BATCH, TIME, WIDTH)
# The layer, its arguments, and how many weights they make.
LAYERS: dict[str, tuple[type[keras.layers.Layer], dict[str, Any], int]] = {
    "Attention2, sines": (layers.Attention2, {"num_heads": 3, "context_length": 9}, 6),
    "Attention2, query": (
        layers.Attention2,
        {"num_heads": 2, "context_length": 9, "use_query": True, "position_dim": 4},
        6,
    ),
    "Attention2, learned": (layers.Attention2, {"num_heads": 3, "decay": "learned"}, 4),
    "Attention2, gated": (
        layers.Attention2,
        {"num_heads": 3, "decay": "gated", "value_dim": 5, "half_lives": (2.0, 9.0)},
        5,
    ),
    "Attention2, all": (
        layers.Attention2,
        {"num_heads": 1, "context_length": 9, "use_query": True, "decay": "gated"},
        8,
    ),
    "GatedLinearAttention": (layers.GatedLinearAttention, {"num_heads": 3}, 11),
    "GatedLinearAttention, scalar": (
        layers.GatedLinearAttention,
        {"num_heads": 3, "gate": "scalar", "key_dim": 5, "value_dim": 7, "chunk_size": 4},
        11,
    ),
    "GatedLinearAttention, fixed": (
        layers.GatedLinearAttention,
        {"num_heads": 2, "gate": "fixed", "half_lives": (2.0, 9.0)},
        8,
    ),
    "GatedLinearAttention, none": (layers.GatedLinearAttention, {"num_heads": 2, "gate": None}, 8),
    "CausalSelfAttention, 5": (
        layers.CausalSelfAttention,
        {"num_heads": 3, "window_length": 5},
        4,
    ),
    "CausalSelfAttention, 40": (
        layers.CausalSelfAttention,
        {"num_heads": 2, "window_length": 40},
        4,
    ),
    "FeedForward2": (layers.FeedForward2, {}, 6),
    "FeedForward2, sizes": (layers.FeedForward2, {"inner_dim": 5, "rank": 3}, 6),
    "FeedForward2, relu": (layers.FeedForward2, {"activation": "relu"}, 6),
    "GatedFeedForward": (layers.GatedFeedForward, {}, 3),
    "GatedFeedForward, sizes": (
        layers.GatedFeedForward,
        {"inner_dim": 5, "activation": "gelu"},
        3,
    ),
}
# The harness compiles with XLA as Keras' "auto" would, and calls `fit` in eager tensors: nothing of
# it depends on the arguments, so each layer is trained once.
TRAINED = {
    "Attention2, all",
    "GatedLinearAttention",
    "CausalSelfAttention, 5",
    "FeedForward2",
    "GatedFeedForward",
}


# Layers and architectures with the bias of a forget gate.
FLOAT32_BIAS = {
    *("Attention2, learned", "Attention2, gated", "Attention2, all"),
    *("GatedLinearAttention", "GatedLinearAttention, scalar"),
    *("elita_gated", "gla", "gla_ff2", "hybrid"),
}


@pytest.fixture
def keras_tests() -> Iterator[Any]:
    yield from _started(testing.TestCase())


@pytest.fixture
def hub_tests() -> Iterator[Any]:
    yield from _started(hub.TestCase())


def _started(case: Any) -> Iterator[Any]:
    policy = keras.config.dtype_policy()
    case.setUp()
    yield case
    case.tearDown()
    case.doCleanups()
    keras.config.set_dtype_policy(policy)


@pytest.mark.parametrize("name", LAYERS)
def test_keras_tests_a_layer(keras_tests: Any, name: str) -> None:
    layer, arguments, weights = LAYERS[name]
    keras_tests.run_layer_test(
        layer,
        arguments,
        input_shape=SHAPE,
        expected_output_shape=SHAPE,
        expected_num_trainable_weights=weights,
        expected_num_non_trainable_weights=0,
        supports_masking=True,
        run_training_check=name in TRAINED,
    )


@pytest.mark.parametrize("name", LAYERS)
def test_keras_hub_tests_a_layer(hub_tests: Any, name: str) -> None:
    layer, arguments, weights = LAYERS[name]
    inputs = np.random.default_rng(3).standard_normal(SHAPE).astype("float32")
    hub_tests.run_layer_test(
        layer,
        arguments,
        input_data=keras.ops.convert_to_tensor(inputs),
        expected_output_shape=SHAPE,
        expected_num_trainable_weights=weights,
        run_training_check=name in TRAINED,
        run_precision_checks=name not in FLOAT32_BIAS,
    )


@pytest.mark.parametrize("architecture", architectures)
def test_keras_hub_tests_a_backbone(hub_tests: Any, architecture: str) -> None:
    sizes = {"vocabulary_size": 50, "hidden_dim": 16, "num_heads": 2, "context_length": 8}
    arguments = {**architectures[architecture], **sizes}
    if architecture != "hybrid":
        arguments["num_layers"] = 1
    hub_tests.run_backbone_test(
        ElitaBackbone,
        arguments,
        input_data=make_ids(),
        expected_output_shape=(2, 7, 16),
        run_mixed_precision_check=architecture not in FLOAT32_BIAS,
        run_quantization_check=architecture == "hybrid",
    )


@pytest.mark.parametrize("architecture", ["elita_gated", "hybrid"])
def test_keras_hub_saves_a_model(hub_tests: Any, architecture: str) -> None:
    sizes = {"vocabulary_size": 50, "hidden_dim": 16, "num_heads": 2, "context_length": 8}
    backbone = ElitaBackbone(**{**architectures[architecture], **sizes})
    for cls, arguments in (
        (ElitaBackbone, backbone.get_config()),
        (ElitaCausalLM, {"backbone": backbone}),
    ):
        arguments = {k: v for k, v in arguments.items() if k != "dtype"}
        hub_tests.run_model_saving_test(cls, arguments, make_ids())


def make_ids() -> dict[str, np.ndarray]:
    return {
        "token_ids": np.arange(2 * 7).reshape(2, 7).astype("int32") % 50,
        "padding_mask": np.array([[True] * 7, [False] * 2 + [True] * 5]),
        "segment_ids": np.array([[0] * 3 + [1] * 4, [0] * 7], "int32"),
    }


TEXTS = ["3 and 4 make 7.", "So they do: 12!"]


@pytest.fixture
def preprocessor(tokenizers: dict) -> ElitaCausalLMPreprocessor:
    return ElitaCausalLMPreprocessor(tokenizers["lossless"], sequence_length=12)


@helpers.tensorflow_only
def test_keras_hub_tests_a_task(
    hub_tests: Any, preprocessor: ElitaCausalLMPreprocessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary_size = preprocessor.tokenizer.vocabulary_size()
    sizes = {"hidden_dim": 16, "num_layers": 1, "context_length": 12}
    backbone = ElitaBackbone(vocabulary_size, **{**architectures["elita_gated"], **sizes})

    def assert_named_alike(given: dict, inputs: dict, **_: Any) -> None:
        assert set(given) == set(inputs) - {"segment_ids"}

    monkeypatch.setattr(hub.tree, "assert_same_structure", assert_named_alike)
    hub_tests.run_task_test(
        ElitaCausalLM,
        {"backbone": backbone, "preprocessor": preprocessor},
        train_data=(TEXTS,),
        expected_output_shape=(2, 12, vocabulary_size),
    )


@helpers.tensorflow_only
def test_keras_hub_tests_a_preprocessor(
    hub_tests: Any, preprocessor: ElitaCausalLMPreprocessor
) -> None:
    config = {"tokenizer": preprocessor.tokenizer, "sequence_length": 12}
    hub_tests.run_preprocessing_layer_test(ElitaCausalLMPreprocessor, config, (TEXTS,))


@helpers.tensorflow_only
@pytest.mark.parametrize("kind", ["lossless", "default"])
def test_keras_hub_tests_a_tokenizer(hub_tests: Any, tokenizers: dict, kind: str) -> None:
    tokenizer = tokenizers[kind]
    hub_tests.run_preprocessing_layer_test(
        type(tokenizer),
        {"proto": tokenizer.proto},
        (TEXTS,),
        expected_detokenize_output=TEXTS,
    )
