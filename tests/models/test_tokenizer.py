"""The KerasHub tokenizers: the ids of `elita_tf.data`, in Python and in graphs."""

import json
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elita_tf.data import GPT2Tokenizer
from elita_tf.models import ElitaGPT2Tokenizer
from tests import helpers
from tests.helpers import budget

pytestmark = helpers.tensorflow_only
TEXTS = [
    "3 and 4 make 7.\nSo they do: 12!\n",
    "",
    "\n",
    "\n\nafter\n",
    " two  spaces \u2581\u2581 and \u2581 marks",
    "Grüße, 日本 😀",
    "NUL at the end\0",
]
KINDS = pytest.mark.parametrize("kind", ["lossless", "default"])


@KINDS
def test_ids_are_those_of_the_data(tokenizers: dict, kind: str) -> None:
    data, layer = tokenizers[kind]
    assert layer(TEXTS) == [data.encode(text).tolist() for text in TEXTS]
    assert list(layer(TEXTS[0])) == data.encode(TEXTS[0]).tolist()
    assert layer.vocabulary_size() == data.vocabulary_size


@KINDS
def test_texts_are_those_of_the_data(tokenizers: dict, kind: str) -> None:
    data, layer = tokenizers[kind]
    rows = layer(TEXTS)
    assert layer.detokenize(rows) == [data.decode(row) for row in rows]
    assert layer.detokenize(rows[0]) == data.decode(rows[0])


@KINDS
def test_a_graph_does_the_same(tokenizers: dict, kind: str) -> None:
    _, layer = tokenizers[kind]
    rows = tf.function(lambda texts: layer(texts))(tf.constant(TEXTS))
    assert rows.to_list() == layer(TEXTS)
    texts = tf.function(lambda ids: layer.detokenize(ids))(rows).numpy()
    assert [text.decode() for text in texts] == layer.detokenize(rows.to_list())
    scalar = tf.function(lambda text: layer(text))(tf.constant(TEXTS[0]))
    assert scalar.numpy().tolist() == layer(TEXTS[0])


def test_a_graph_made_after_the_seed_was_set(tokenizers: dict) -> None:
    _, layer = tokenizers["lossless"]
    keras.utils.set_random_seed(1)
    dataset = (
        tf.data.Dataset.from_tensor_slices(TEXTS).batch(len(TEXTS)).map(lambda texts: layer(texts))
    )
    assert next(iter(dataset)).to_list() == layer(TEXTS)


@settings(budget(60, 2000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_lossless_on_any_text(tokenizers: dict, text: str) -> None:
    _, layer = tokenizers["lossless"]
    assert layer.detokenize(layer([text])) == [text]


@KINDS
def test_saved_and_loaded(tokenizers: dict, kind: str, tmp_path: Path) -> None:
    _, layer = tokenizers[kind]
    layer.save_assets(str(tmp_path))
    loaded = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    loaded.load_assets(str(tmp_path))
    assert loaded(TEXTS) == layer(TEXTS)
    assert (loaded.start_token_id, loaded.end_token_id) == (layer.start_token_id, 2)
    assert layer.start_token_id == {"lossless": 1, "default": 2}[kind]


def test_gpt2_is_that_of_the_data_also_when_loaded(tmp_path: Path) -> None:
    tokens = ["<|endoftext|>", *"abcs.'", "Ġ", "Ċ", "ab", "Ġa", "'s"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n' s\n")
    data = GPT2Tokenizer(tmp_path)
    layer = ElitaGPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    layer.save_assets(str(tmp_path))
    loaded = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    loaded.load_assets(str(tmp_path))
    text = "ab's a\nabc."
    for each in (layer, loaded):
        assert list(each([text])[0]) == data.encode(text).tolist()
        assert each.detokenize(each([text])) == [text]


@pytest.mark.parametrize("in_graph", [False, True])
def test_gpt2_shows_cut_characters_and_loses_no_byte_of_whole_ones(in_graph: bool) -> None:
    vocabulary = {"a": 0, "æ": 1, "Ĺ": 2, "¥": 3, "aa": 4, "<|endoftext|>": 5}
    layer = ElitaGPT2Tokenizer(vocabulary, ["a a"])

    def texts(rows: list) -> list[str]:
        if not in_graph:
            return layer.detokenize(rows)
        graph = tf.function(layer.detokenize)
        return [text.decode() for text in graph(tf.ragged.constant(rows)).numpy()]

    # Ids 1 to 3 are the bytes of U+65E5.
    assert texts([[0, 1, 2, 3], [0, 1], [1, 2, 0]]) == ["a\u65e5", "a\ufffd", "\ufffda"]
    assert layer.detokenize([0, 1, 2, 3]) == "a\u65e5"


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb"])
def test_half_a_character_is_no_text(tokenizers: dict, text: str) -> None:
    for _, layer in tokenizers.values():
        for inputs in (text, [text], ["fine", text]):
            with pytest.raises(ValueError, match="surrogates not allowed"):
                layer(inputs)
