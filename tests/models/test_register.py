"""A user's own layer in a backbone: trained, padded, in segments, streamed, saved, exported."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf import layers, ops
from elita_tf.models import (
    ElitaBackbone,
    ElitaCausalLM,
    export_saved_model,
    register_feed_forward,
    register_mixer,
    registry,
)
from tests import helpers
from tests.helpers import jitted, randomized

VOCABULARY, BATCH, TIME = 23, 4, 9
IDS, LABELS = np.random.default_rng(0).integers(0, VOCABULARY, (2, BATCH, TIME)).astype("int32")


@keras.saving.register_keras_serializable(package="tests")
class MovingAverage(keras.layers.Layer):
    """y_t = W s_t;  s_t = decay s_{t-1} + (1 - decay) x_t, and s_t = s_{t-1} where masked."""

    def __init__(self, decay: float = 0.5, num_heads: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.decay, self.num_heads = decay, num_heads
        self.supports_masking = True

    def build(self, input_shape: tuple) -> None:
        self.width = input_shape[-1]
        self.projection = keras.layers.Dense(
            self.width, use_bias=False, dtype=self.dtype_policy, name="projection"
        )
        self.projection.build(input_shape)

    def call(self, inputs: Any, mask: Any = None, segment_ids: Any = None) -> Any:
        return self._average(inputs, None, mask, segment_ids)[0]

    def call_with_state(
        self, inputs: Any, state: dict, mask: Any = None, segment_ids: Any = None
    ) -> tuple[Any, dict]:
        outputs, average = self._average(inputs, state["average"], mask, segment_ids)
        return outputs, {"average": average}

    def get_initial_state(self, batch_size: int) -> dict:
        return {"average": keras.ops.zeros((batch_size, 1, 1, self.width))}

    def _average(self, inputs: Any, state: Any, mask: Any, segment_ids: Any) -> tuple[Any, Any]:
        # Gated linear attention of one head, one key feature and a constant decay.
        ones = keras.ops.ones_like(inputs[..., :1])[:, :, None]
        real = ones if mask is None else ones * keras.ops.cast(mask, ones.dtype)[..., None, None]
        averages, state = ops.gated_linear_attention(
            query=ones,
            key=(1 - self.decay) * real,
            value=inputs[:, :, None],
            log_decay=float(np.log(self.decay)) * real,
            initial_state=state,
            scale=1.0,
            segment_ids=segment_ids,
        )
        return self.projection(averages[:, :, 0]), state

    @property
    def output_kernel(self) -> keras.Variable:
        return self.projection.kernel

    def compute_output_shape(self, input_shape: tuple, **_: Any) -> tuple:
        return input_shape

    def get_config(self) -> dict:
        return {**super().get_config(), "decay": self.decay, "num_heads": self.num_heads}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for table in ("MIXERS", "FEED_FORWARDS"):
            patch.setattr(registry, table, dict(getattr(registry, table)))
        register_mixer("moving_average", MovingAverage)
        register_mixer("slow_average", MovingAverage, decay=0.9, num_heads=7)
        register_feed_forward("relu_gate", layers.GatedFeedForward, activation="relu", inner_dim=5)
        yield


def make_backbone(**kwargs: Any) -> ElitaBackbone:
    keras.utils.set_random_seed(3)
    sizes = {"num_layers": 2, "hidden_dim": 12, "num_heads": 3, "context_length": 8}
    mixers = {"mixers": ["moving_average", "slow_average"], "feed_forward": "relu_gate"}
    return ElitaBackbone(VOCABULARY, **{**sizes, **mixers, **kwargs})


def make_model(**kwargs: Any) -> ElitaCausalLM:
    return ElitaCausalLM(randomized(make_backbone(), scale=0.4), **kwargs)


def test_the_layer_is_the_equation() -> None:
    layer = MovingAverage(decay=0.75)
    x = np.random.default_rng(1).normal(size=(2, 5, 3)).astype("float32")
    layer.build(x.shape)
    mask = np.array([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]], "bool")
    received = np.array(jitted(layer)(x, mask=mask))
    for row in range(2):
        average = np.zeros(3)
        for t in np.flatnonzero(mask[row]):
            average = 0.75 * average + 0.25 * x[row, t]
            expected = average @ np.array(layer.output_kernel)
            np.testing.assert_allclose(received[row, t], expected, atol=1e-6)


def test_arguments_come_from_the_options_the_name_and_the_backbone_in_this_order() -> None:
    backbone = make_backbone(mixer_options={"slow_average": {"decay": 0.8}})
    fast, slow = (block.mixer.layer for block in backbone.blocks)
    assert [block.mixer.layer.name for block in backbone.blocks] == [
        "block_0_moving_average",
        "block_1_slow_average",
    ]
    assert (fast.decay, fast.num_heads) == (0.5, 3) and (slow.decay, slow.num_heads) == (0.8, 7)
    feed_forward = backbone.blocks[0].feed_forward.layer
    assert feed_forward.inner_dim == 5 and feed_forward.activation.__name__ == "relu"
    changed = make_backbone(feed_forward_options={"inner_dim": 4}).blocks[0].feed_forward.layer
    assert changed.inner_dim == 4 and changed.activation.__name__ == "relu"
    assert not np.array(fast.output_kernel).any()


@pytest.mark.long
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "plain"])
def test_it_is_trained(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if shared and helpers.BACKEND != "tensorflow":
        pytest.skip("shared compilation is TensorFlow's")
    if shared:  # as plain graphs: XLA would take long for small models
        import tensorflow as tf

        function = tf.function
        plain = {"jit_compile": False}
        monkeypatch.setattr(tf, "function", lambda run, **o: function(run, **{**o, **plain}))
    model = make_model()
    jit_compile = "blocks" if shared else helpers.QUICKEST
    model.compile(keras.optimizers.Adam(0.02), jit_compile=jit_compile)
    x, y = {"token_ids": np.tile(IDS, (30, 1))}, np.tile(LABELS, (30, 1))
    before = [np.array(variable) for variable in model.trainable_variables]
    losses = model.fit(x, y, batch_size=BATCH, epochs=2, verbose=0).history["loss"]
    assert losses[1] < losses[0] - 0.5
    after = model.trainable_variables
    assert not any(np.array_equal(b, np.array(a)) for b, a in zip(before, after, strict=True))


def test_padding_and_segments_change_nothing() -> None:
    backbone = randomized(make_backbone(), scale=0.4)
    call = jitted(backbone)
    whole = np.array(call({"token_ids": IDS[:1]}))
    padded = np.pad(IDS[:1], ((0, 0), (2, 3)))
    mask = np.pad(np.ones((1, TIME), "bool"), ((0, 0), (2, 3)))
    received = np.array(call({"token_ids": padded, "padding_mask": mask}))[:, 2:-3]
    np.testing.assert_allclose(received, whole, atol=1e-5)
    packed = np.concatenate([IDS[1:2, :4], IDS[:1]], axis=1)
    segments = (np.arange(TIME + 4) >= 4).astype("int32")[None]
    received = np.array(call({"token_ids": packed, "segment_ids": segments}))[:, 4:]
    np.testing.assert_allclose(received, whole, atol=1e-5)


def test_it_streams_and_generates() -> None:
    model = make_model()
    whole = np.array(jitted(model)({"token_ids": IDS}))
    logits, state = jitted(model.prefill)(IDS[:, :4])
    assert set(state) == {"block_0_moving_average_average", "block_1_slow_average_average"}
    step = jitted(model.step)
    for t in range(4, TIME):
        np.testing.assert_allclose(np.array(logits), whole[:, t - 1], atol=1e-4)
        logits, state = step(IDS[:, t], state)
    if helpers.BACKEND == "tensorflow":  # KerasHub's samplers on JAX need int64 to be off
        model.compile(sampler="greedy", run_eagerly=True)
        mask = np.broadcast_to(np.arange(TIME) < TIME - 1, (BATCH, TIME))
        inputs = {"token_ids": IDS, "padding_mask": mask}
        outputs = model.generate(inputs, stop_token_ids=None)["token_ids"]
        np.testing.assert_array_equal(outputs[:, -1], whole[:, -2].argmax(-1))


def test_it_is_saved_as_a_preset(tmp_path: Path) -> None:
    model = make_model()
    model.save_to_preset(tmp_path)
    loaded = ElitaCausalLM.from_preset(str(tmp_path))
    expected, received = (np.array(jitted(m)({"token_ids": IDS})) for m in (model, loaded))
    np.testing.assert_array_equal(received, expected)


@pytest.mark.long
@helpers.tensorflow_only
def test_it_is_exported(tmp_path: Path) -> None:
    import tensorflow as tf

    model = make_model()
    export_saved_model(model, tmp_path)
    served = tf.saved_model.load(str(tmp_path)).signatures["serve"]
    expected = np.array(model({"token_ids": IDS}))
    np.testing.assert_allclose(served(token_ids=tf.constant(IDS))["logits"], expected, atol=1e-5)


@keras.saving.register_keras_serializable(package="tests")
class DroppedOut(layers.GatedFeedForward):
    """With a dropout of its own."""

    def build(self, input_shape: tuple) -> None:
        super().build(input_shape)
        self.dropout = keras.layers.Dropout(0.5, seed=1)

    def call(self, inputs: Any) -> Any:
        return self.dropout(super().call(inputs))


def test_random_numbers_of_a_layer_are_drawn_or_refused() -> None:
    register_feed_forward("dropped_out", DroppedOut)
    backbone = randomized(make_backbone(feed_forward="dropped_out", num_layers=6), scale=0.4)
    inputs = {"token_ids": IDS}
    one, other = (np.array(backbone(inputs, training=training)) for training in (True, False))
    assert not np.allclose(one, other)
    for options in ({"rematerialize": True}, {"carried_batch_size": BATCH}):
        with pytest.raises(ValueError, match="draws random numbers"):
            ElitaCausalLM(backbone, **options)
    model = ElitaCausalLM(backbone)
    assert model._shared_compilation is None  # although it has more than four blocks
    with pytest.raises(ValueError, match="draw random numbers"):
        model.compile(jit_compile="blocks")


class Bare(keras.layers.Layer):
    """Has nothing that a backbone needs."""

    def __init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_mixer("gla", MovingAverage), "'gla' is in use.*'softmax'"),
        (lambda: register_mixer("moving_average", MovingAverage), "in use"),
        (lambda: register_mixer("swiglu", MovingAverage), "in use"),
        (lambda: register_mixer("feed_forward_norm", MovingAverage), "in use"),
        (lambda: register_feed_forward("swiglu", layers.GatedFeedForward), "in use"),
        (lambda: register_mixer("a/b", MovingAverage), "letters, digits.*received 'a/b'"),
        (lambda: register_mixer(3, MovingAverage), "received 3"),
        (lambda: register_mixer("new", MovingAverage()), "expected a class of Keras layers"),
        (lambda: register_mixer("new", dict), "expected a class of Keras layers"),
        (lambda: register_mixer("new", Bare), r"Bare lacks call_with_state.*\*\*kwargs"),
        (lambda: register_feed_forward("new", keras.layers.Dense), "Dense lacks output_kernel"),
        (lambda: register_mixer("new", MovingAverage, rate=1), r"some of .*decay.*received rate"),
        (lambda: make_backbone(mixers="slow"), "slow_average.*received 'slow'.*register_mixer"),
        (lambda: make_backbone(feed_forward="relu"), "relu_gate.*received 'relu'"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    before = set(registry.MIXERS), set(registry.FEED_FORWARDS)
    with pytest.raises(ValueError, match=message):
        call()
    assert (set(registry.MIXERS), set(registry.FEED_FORWARDS)) == before
