"""Embeddings and norms of a GPT-2 preset, written here in KerasHub's own format."""

from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures, load_gpt2_embeddings
from tests.helpers import jitted, randomized

SIZES = {"vocabulary_size": 23, "num_layers": 2, "hidden_dim": 16, "context_length": 7}


def make_backbone(**kwargs) -> ElitaBackbone:
    return ElitaBackbone(**{**architectures["gla"], **SIZES, "learned_positions": True, **kwargs})


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    gpt2 = keras_hub.models.GPT2Backbone(
        vocabulary_size=23,
        num_layers=3,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=20,
        max_sequence_length=11,
    )
    folder = tmp_path_factory.mktemp("gpt2")
    randomized(gpt2).save_to_preset(str(folder))
    return folder


def test_embeddings_and_norms_are_gpt2s(preset: Path) -> None:
    backbone = make_backbone()
    load_gpt2_embeddings(backbone, str(preset))
    gpt2 = keras_hub.models.GPT2Backbone.from_preset(str(preset))
    theirs = {weight.path: keras.ops.convert_to_numpy(weight) for weight in gpt2.weights}
    ours = {weight.path: keras.ops.convert_to_numpy(weight) for weight in backbone.weights}
    pairs = {
        "token_embedding/embeddings": "token_embedding/embeddings",
        "final_norm/gamma": "layer_norm/gamma",
        "final_norm/beta": "layer_norm/beta",
        "block_0_mixer_norm/gamma": "transformer_layer_0/self_attention_layer_norm/gamma",
        "block_1_mixer_norm/beta": "transformer_layer_1/self_attention_layer_norm/beta",
        "block_0_feed_forward_norm/beta": "transformer_layer_0/feedforward_layer_norm/beta",
        "block_1_feed_forward_norm/gamma": "transformer_layer_1/feedforward_layer_norm/gamma",
    }
    for mine, source in pairs.items():
        np.testing.assert_array_equal(ours[mine], theirs[source])
    positions = theirs["position_embedding/embeddings"]
    np.testing.assert_array_equal(ours["position_embedding/embeddings"], positions[:7])


def test_untrained_blocks_leave_gpt2s_embeddings_to_the_last_norm(preset: Path) -> None:
    backbone = make_backbone()
    load_gpt2_embeddings(backbone, str(preset))
    gpt2 = keras_hub.models.GPT2Backbone.from_preset(str(preset))
    ids = np.array([[3, 1, 22, 4, 4]])
    embedded = gpt2.token_embedding(ids) + gpt2.position_embedding(gpt2.token_embedding(ids))
    expected = np.array(gpt2.layer_norm(embedded))
    np.testing.assert_allclose(np.array(jitted(backbone)({"token_ids": ids})), expected, atol=1e-4)


def test_all_of_it_is_trained_and_causal(preset: Path) -> None:
    backbone = make_backbone()
    load_gpt2_embeddings(backbone, str(preset))
    model = ElitaCausalLM(backbone)
    # A block: 2 norms of 2, q, k, v, gate (down, up and bias), output gate and bias, the norm per
    # head, output, and SwiGLU's 3; besides, two embeddings and the last norm.
    assert len(model.trainable_variables) == 2 * (4 + 3 + 3 + 2 + 2 + 1 + 3) + 2 + 2
    assert model.non_trainable_variables == []
    randomized(model, scale=0.3)
    ids = np.array([[3, 1, 22, 4, 4, 9]])
    changed = np.where(np.arange(6) == 4, 8, ids)
    call = jitted(model)
    first, second = (np.array(call({"token_ids": x})) for x in (ids, changed))
    np.testing.assert_array_equal(first[:, :4], second[:, :4])
    assert (first[:, 4:] != second[:, 4:]).any(axis=-1).all()


@pytest.mark.parametrize(
    ("kwargs", "numbers"),
    [
        ({"hidden_dim": 24}, "24.*16"),
        ({"vocabulary_size": 22}, "22.*23"),
        ({"context_length": 12}, "12.*11"),
        ({"num_layers": 4}, "4.*3"),
        ({"learned_positions": False}, "learned_positions=False"),
        ({"normalization": "rms_norm"}, "'rms_norm'"),
    ],
)
def test_what_does_not_fit_is_named(preset: Path, kwargs: dict, numbers: str) -> None:
    with pytest.raises(ValueError, match=numbers):
        load_gpt2_embeddings(make_backbone(**kwargs), str(preset))


def test_a_folder_that_is_no_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        load_gpt2_embeddings(make_backbone(), str(tmp_path))


def test_positions_beyond_the_last_share_its_embedding() -> None:
    backbone = randomized(make_backbone(), scale=0.5)
    embedded = np.array(backbone.position_embedding(np.zeros((1, 10), "int32")))
    table = keras.ops.convert_to_numpy(backbone.position_embedding.embeddings)
    np.testing.assert_array_equal(embedded[0, :7], table)
    np.testing.assert_array_equal(embedded[0, 7:], table[[6, 6, 6]])


def test_without_a_network_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(preset: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(keras_hub.models.GPT2Backbone, "from_preset", offline)
    with pytest.raises(OSError, match="gpt2_base_en.*no route.*init_embeddings"):
        load_gpt2_embeddings(make_backbone())
