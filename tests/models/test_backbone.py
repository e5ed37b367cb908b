"""The decoder: its wiring, its arguments and what its inputs may look like."""

from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from elita_tf import layers
from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures
from tests.helpers import jitted, randomized

VOCABULARY, TIME = 23, 9
ARGUMENTS = {
    "vocabulary_size": VOCABULARY,
    "num_layers": 2,
    "hidden_dim": 12,
    "num_heads": 3,
    "context_length": 7,
}
MIXERS = ["attention2", "attention2_query", "attention2_gated", "gla", "softmax"]


def token_ids(batch: int = 2, time: int = TIME) -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (batch, time)).astype("int32")


@pytest.fixture(autouse=True)
def seeded() -> None:
    keras.utils.set_random_seed(0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_later_tokens_do_not_reach_earlier_hidden_states(mixer: str) -> None:
    backbone = randomized(ElitaBackbone(**ARGUMENTS, mixers=mixer))
    ids = token_ids()
    changed = ids.copy()
    changed[:, 5] = (changed[:, 5] + 1) % VOCABULARY
    call = jitted(backbone)
    before = np.array(call({"token_ids": ids}))
    after = np.array(call({"token_ids": changed}))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.abs(before[:, 5:] - after[:, 5:]).max(axis=(0, 2)).min() > 0


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_on_either_side_changes_nothing(mixer: str) -> None:
    backbone = randomized(ElitaBackbone(**ARGUMENTS, mixers=mixer))
    ids = token_ids(batch=1)
    expected = np.array(jitted(backbone)({"token_ids": ids}))
    for before, after in ((4, 0), (0, 3)):
        padded = np.pad(ids, ((0, 0), (before, after)), constant_values=1)
        mask = np.pad(np.ones_like(ids, bool), ((0, 0), (before, after)))
        outputs = np.array(jitted(backbone)({"token_ids": padded, "padding_mask": mask}))
        np.testing.assert_allclose(
            outputs[:, before : before + TIME], expected, atol=1e-5, rtol=1e-4
        )


def test_block_is_two_residual_lines() -> None:
    arguments = {**ARGUMENTS, "num_layers": 1, "mixers": "gla", "feed_forward": "swiglu"}
    backbone = randomized(ElitaBackbone(**arguments))
    layer = backbone.get_layer

    @jitted
    def written_out(ids: np.ndarray) -> Any:
        x = layer("token_embedding")(ids)
        x = x + layer("block_0_gla")(layer("block_0_mixer_norm")(x))
        x = x + layer("block_0_swiglu")(layer("block_0_feed_forward_norm")(x))
        return layer("final_norm")(x)

    np.testing.assert_allclose(
        np.array(jitted(backbone)({"token_ids": token_ids()})),
        np.array(written_out(token_ids())),
        atol=1e-5,
    )


@pytest.mark.parametrize("feed_forward", ["feed_forward2", "swiglu"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_blocks_start_as_the_identity(mixer: str, feed_forward: str) -> None:
    backbone = ElitaBackbone(**ARGUMENTS, mixers=mixer, feed_forward=feed_forward)
    embedded = backbone.token_embedding(token_ids())
    np.testing.assert_array_equal(
        np.array(jitted(backbone)({"token_ids": token_ids()})),
        np.array(jitted(backbone.final_norm)(embedded)),
    )


def test_mixers_are_one_per_block() -> None:
    backbone = ElitaBackbone(**{**ARGUMENTS, "num_layers": 3}, mixers=["gla", "softmax", "gla"])
    kinds = [type(block.mixer.layer) for block in backbone.blocks]
    assert kinds == [
        layers.GatedLinearAttention,
        layers.CausalSelfAttention,
        layers.GatedLinearAttention,
    ]


def test_mixers_are_a_pattern_that_repeats() -> None:
    backbone = ElitaBackbone(**{**ARGUMENTS, "num_layers": 4}, mixers=["gla", "softmax"])
    names = [block.mixer.layer.name for block in backbone.blocks]
    assert names == ["block_0_gla", "block_1_softmax", "block_2_gla", "block_3_softmax"]
    assert backbone.get_config()["mixers"] == ["gla", "softmax"]


def test_options_reach_their_layers_and_are_saved(tmp_path: Path) -> None:
    options = {"attention2_gated": {"half_lives": [2, 9]}, "gla": {"num_heads": 2, "gate": "fixed"}}
    backbone = ElitaBackbone(
        **ARGUMENTS,
        mixers=["attention2_gated", "gla"],
        mixer_options=options,
        feed_forward_options={"rank": 2},
    )
    backbone.save(tmp_path / "backbone.keras")
    for each in (backbone, keras.models.load_model(tmp_path / "backbone.keras")):
        gated, gla = (block.mixer.layer for block in each.blocks)
        assert (gated.half_lives, gated.num_heads, gated.context_length) == ((2, 9), 3, None)
        assert (gla.num_heads, gla.gate) == (2, "fixed")
        assert all(block.feed_forward.layer.rank == 2 for block in each.blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer_options": {"gla": {"rank": 3}}}, r"gate_rank.*received rank"),
        ({"mixer_options": {"gla": {"name": "x"}}}, "received name"),
        ({"mixer_options": {"softmax": {}}}, r"its mixers \['gla'\], received some for 'softmax'"),
        ({"mixer_options": {"gla": 3}}, "expected a dict, received 3"),
        ({"mixer_options": [1]}, r"expected a dict, received \[1\]"),
        ({"feed_forward_options": {"gate": 1}}, "FeedForward2: expected some of .*received gate"),
    ],
)
def test_options_that_are_none_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElitaBackbone(**ARGUMENTS, mixers="gla", **options)


def test_softmax_blocks_have_a_window_of_their_own(tmp_path: Path) -> None:
    mixers = {"mixers": ["attention2", "softmax"], "learned_positions": True}
    same = ElitaBackbone(**ARGUMENTS, **mixers)
    other = ElitaBackbone(**ARGUMENTS, **mixers, window_length=4)
    other.save(tmp_path / "backbone.keras")
    loaded = keras.models.load_model(tmp_path / "backbone.keras")
    for backbone, window in ((same, 7), (other, 4), (loaded, 4)):
        attention2, softmax = (block.mixer.layer for block in backbone.blocks)
        assert (attention2.context_length, softmax.window_length) == (7, window)
        assert backbone.position_embedding.num_positions == 7
        assert backbone.get_initial_state(2)["block_1_softmax_key"].shape[1] == window
    ids = token_ids()
    changed = ids.copy()
    changed[:, 2] = (changed[:, 2] + 1) % VOCABULARY
    only_softmax = {**ARGUMENTS, "num_layers": 1, "mixers": "softmax", "window_length": 4}
    call = jitted(randomized(ElitaBackbone(**only_softmax)))
    difference = np.array(call({"token_ids": ids})) - np.array(call({"token_ids": changed}))
    reached = np.abs(difference).max(axis=(0, 2)) > 0
    assert reached.tolist() == [2 <= t < 6 for t in range(TIME)]


EFFECTS = {
    "vocabulary_size": 29,
    "num_layers": 3,
    "hidden_dim": 18,
    "num_heads": 2,
    "mixers": "gla",
    "mixer_options": {"attention2": {"value_dim": 5}},
    "feed_forward": "swiglu",
    "feed_forward_options": {"rank": 3},
    "normalization": "rms_norm",
    "context_length": 5,
    "tie_embeddings": False,
}


@pytest.mark.parametrize("argument", EFFECTS)
def test_every_argument_has_an_effect(argument: str) -> None:
    def fingerprint(**kwargs: object) -> list[np.ndarray]:
        backbone = randomized(ElitaBackbone(**{**ARGUMENTS, **kwargs}))
        return [*backbone.get_weights(), np.array(jitted(backbone)({"token_ids": token_ids()}))]

    one, other = fingerprint(), fingerprint(**{argument: EFFECTS[argument]})
    assert len(one) != len(other) or any(
        a.shape != b.shape or not np.array_equal(a, b) for a, b in zip(one, other, strict=True)
    )


def test_symbolic_inputs_may_lack_the_optional_ones() -> None:
    backbone = randomized(ElitaBackbone(**ARGUMENTS, mixers="gla"))
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    pooled = keras.layers.GlobalAveragePooling1D()(backbone({"token_ids": ids}))
    classifier = keras.Model(ids, keras.layers.Dense(3)(pooled))
    expected = np.array(jitted(backbone)({"token_ids": token_ids()})).mean(axis=1)
    kernel, bias = classifier.layers[-1].get_weights()
    received = np.array(jitted(classifier)(token_ids()))
    np.testing.assert_allclose(received, expected @ kernel + bias, atol=1e-5)
    spec = backbone.compute_output_spec({"token_ids": keras.Input((5,), 2, dtype="int32")})
    assert spec.shape == (2, 5, 12)
    assert backbone.compute_output_shape({"token_ids": (2, 5)}) == (2, 5, 12)
    symbol = backbone.symbolic_call({"token_ids": keras.KerasTensor((2, 5), "int32")})
    assert symbol.shape == (2, 5, 12)
    model = ElitaCausalLM(backbone)
    assert model.compute_output_shape({"token_ids": (None, None)}) == (None, None, VOCABULARY)
    for each in (backbone, model):
        with pytest.raises(ValueError, match=r"the shapes of `token_ids`.*received \(2, 5\)"):
            each.compute_output_shape((2, 5))
    # A part of the backbone, as Keras makes it of any functional model.
    part = keras.Model(backbone.input, backbone.get_layer("block_0_gla").output)
    inputs = {"token_ids": token_ids(), "padding_mask": None, "segment_ids": None}
    assert part(inputs).shape == (2, TIME, 12)


def test_its_blocks_have_the_name_of_keras_hub() -> None:
    backbone = ElitaBackbone(**ARGUMENTS)
    structure = ElitaCausalLM(backbone).get_quantization_layer_structure("gptq")
    assert structure["sequential_blocks"] is backbone.blocks
    assert structure["pre_block_layers"] == [backbone.token_embedding]


CUT = {
    "token_embedding/embeddings": ("model", None),
    "token_embedding/reverse_embeddings": (None, "model"),
    "block_0_attention2_gated/value/kernel": (None, "model", None),
    "block_0_attention2_gated/logits/kernel": (None, "model", None),
    "block_0_attention2_gated/decay/kernel": (None, "model"),
    "block_0_attention2_gated/output/kernel": ("model", None, None),
    "block_1_gla/query/kernel": (None, "model", None),
    "block_1_gla/key/kernel": (None, "model", None),
    "block_1_gla/value/kernel": (None, "model", None),
    "block_1_gla/gate_up/kernel": (None, "model", None),
    "block_1_gla/output_gate/kernel": (None, "model", None),
    "block_1_gla/output/kernel": ("model", None, None),
    "block_2_softmax/query/kernel": (None, "model", None),
    "block_2_softmax/key/kernel": (None, "model", None),
    "block_2_softmax/value/kernel": (None, "model", None),
    "block_2_softmax/output/kernel": ("model", None, None),
    "block_0_feed_forward2/first/kernel": (None, "model"),
    "block_0_feed_forward2/first/bias": ("model",),
    "block_0_feed_forward2/kernel": ("model", None, None),
    "block_0_swiglu/gate/kernel": (None, "model"),
    "block_0_swiglu/value/kernel": (None, "model"),
    "block_0_swiglu/output/kernel": ("model", None),
}


@pytest.mark.parametrize("names", [("batch", "model"), ("data", "tensor")], ids=str)
@pytest.mark.parametrize("feed_forward", ["feed_forward2", "swiglu"])
def test_the_layout_map_cuts_heads_features_and_the_vocabulary(
    feed_forward: str, names: tuple[str, str]
) -> None:
    mixers = ["attention2_gated", "gla", "softmax"]
    arguments = {**ARGUMENTS, "num_layers": 3, "mixers": mixers, "feed_forward": feed_forward}
    backbone = ElitaBackbone(**arguments, tie_embeddings=False)
    mesh = keras.distribution.DeviceMesh((1, 2), names, ["cpu:0", "cpu:1"])
    layouts = backbone.get_layout_map(
        mesh, data_parallel_dim_name=names[0], model_parallel_dim_name=names[1]
    )
    found = {}
    for variable in backbone.variables:
        layout = layouts[variable.path]
        if layout is not None:
            assert len(layout.axes) == len(variable.shape), variable.path
            found[variable.path] = layout.axes
    own = {path: axes for path, axes in CUT.items() if path in {v.path for v in backbone.variables}}
    expected = {path: tuple(axis and names[1] for axis in axes) for path, axes in own.items()}
    for block in (1, 2):  # its feed-forward is that of the first block
        for path, axes in list(expected.items()):
            if path.startswith(f"block_0_{feed_forward}/"):
                expected[path.replace("block_0", f"block_{block}")] = axes
    assert found == expected


@pytest.mark.parametrize(
    ("mesh", "names", "message"),
    [
        (3, {}, "expected a keras.distribution.DeviceMesh, received 3"),
        (None, {"model_parallel_dim_name": "tensor"}, r"an axis 'tensor'.*\['batch', 'model'\]"),
        (None, {"data_parallel_dim_name": "data"}, "an axis 'data'"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh: Any, names: dict, message: str) -> None:
    made = keras.distribution.DeviceMesh((1, 2), ["batch", "model"], ["cpu:0", "cpu:1"])
    with pytest.raises(ValueError, match=message):
        ElitaBackbone.get_layout_map(mesh or made, **names)


def test_dropout_acts_in_training_only() -> None:
    backbone = ElitaBackbone(**ARGUMENTS, dropout=0.5)
    inputs = {"token_ids": token_ids()}
    inference = np.array(jitted(backbone)(inputs))
    np.testing.assert_array_equal(
        inference, np.array(jitted(partial(backbone, training=False))(inputs))
    )
    assert not np.allclose(inference, np.array(backbone(inputs, training=True)))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("mixers", "softmaxx", "softmaxx"),
        ("mixers", ["gla"] * 3, "divides 2, the `num_layers`, received 3"),
        ("feed_forward", "mlp", "swiglu"),
        ("normalization", "batch", "rms_norm"),
        ("num_layers", 0, "received 0"),
        ("num_heads", 5, "12 features over 5 heads"),
        ("context_length", 0, "received 0"),
        ("hidden_dim", 0, "received 0"),
        ("vocabulary_size", -3, "-3"),
        ("dropout", 1.5, "1.5"),
    ],
)
def test_bad_arguments_are_refused(argument: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElitaBackbone(**{**ARGUMENTS, argument: value})


@pytest.mark.parametrize("name", sorted(architectures))
def test_architecture_has_at_most_300k_parameters(name: str) -> None:
    backbone = ElitaBackbone(vocabulary_size=2048, **architectures[name])
    assert 250_000 < backbone.count_params() <= 300_000
    twin = ElitaBackbone.from_config(backbone.get_config())
    assert [w.shape for w in twin.weights] == [w.shape for w in backbone.weights]


def test_mixed_precision_keeps_states_in_float32() -> None:
    backbone = ElitaBackbone(**ARGUMENTS, mixers=["attention2", "gla"], dtype="mixed_bfloat16")
    hidden = jitted(backbone)({"token_ids": token_ids()})
    assert keras.backend.standardize_dtype(hidden.dtype) == "bfloat16"
    for block in backbone.blocks:
        state = block.mixer.layer.get_initial_state(2)
        dtypes = {keras.backend.standardize_dtype(leaf.dtype) for leaf in state.values()}
        assert dtypes <= {"float32", "int32"}
