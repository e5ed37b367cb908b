"""The tokenizers of corpora as layers of models: every form of input, in Python and in graphs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elita_tf.data import load_tokenizer
from elita_tf.models import ElitaGPT2Tokenizer, ElitaTokenizer
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
ALL_KINDS = pytest.mark.parametrize("kind", ["lossless", "default", "gpt2"])


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> ElitaGPT2Tokenizer:
    """Byte pieces and a few merges, in GPT-2's own files."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokens = ["<|endoftext|>", *"abcs.'34", "Ġ", "Ċ", "ab", "Ġa", "'s"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nĠ a\n' s\n")
    return load_tokenizer(folder)


@pytest.fixture
def tokenizer(kind: str, tokenizers: dict, gpt2: ElitaGPT2Tokenizer) -> Any:
    return {**tokenizers, "gpt2": gpt2}[kind]


@KINDS
def test_a_text_has_the_ids_of_a_corpus(tokenizer: ElitaTokenizer) -> None:
    assert tokenizer(TEXTS) == [tokenizer.encode(text).tolist() for text in TEXTS]
    assert list(tokenizer(TEXTS[0])) == tokenizer.encode(TEXTS[0]).tolist()


@KINDS
def test_ids_are_those_of_the_library(tokenizer: ElitaTokenizer, kind: str) -> None:
    from sentencepiece import SentencePieceProcessor

    library = SentencePieceProcessor(model_proto=tokenizer.proto)
    for text in ("3 and 4 make 7.", "So they do"):
        assert tokenizer(text) == library.encode(text)
    if kind == "default":
        lines = [library.encode(line) for line in ("3 and", "", "4")]
        assert tokenizer("3 and\n\n4") == [*lines[0], 2, *lines[1], 2, *lines[2]]
    else:
        mark = [library.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        assert tokenizer("3\u2581\n") == [*library.encode("3"), *mark, *library.encode("\n")]


@KINDS
def test_a_graph_does_the_same(tokenizer: ElitaTokenizer) -> None:
    rows = tf.function(lambda texts: tokenizer(texts))(tf.constant(TEXTS))
    assert rows.to_list() == tokenizer(TEXTS)
    texts = tf.function(lambda ids: tokenizer.detokenize(ids))(rows).numpy()
    assert [text.decode() for text in texts] == tokenizer.detokenize(rows.to_list())
    scalar = tf.function(lambda text: tokenizer(text))(tf.constant(TEXTS[0]))
    assert scalar.numpy().tolist() == tokenizer(TEXTS[0])
    text = tf.function(lambda ids: tokenizer.detokenize(ids))(scalar)
    assert text.numpy().decode() == tokenizer.detokenize(scalar.numpy())


def test_a_graph_made_after_the_seed_was_set(tokenizers: dict) -> None:
    tokenizer = tokenizers["lossless"]
    keras.utils.set_random_seed(1)
    texts = tf.data.Dataset.from_tensor_slices(TEXTS).batch(len(TEXTS))
    dataset = texts.map(lambda batch: tokenizer(batch))
    assert next(iter(dataset)).to_list() == tokenizer(TEXTS)


@settings(budget(60, 2000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.characters(codec="utf-8")))
def test_lossless_on_any_text(tokenizers: dict, text: str) -> None:
    tokenizer = tokenizers["lossless"]
    assert tokenizer.detokenize(tokenizer([text])) == [text]


@ALL_KINDS
def test_saved_and_loaded(tokenizer: Any, kind: str, tmp_path: Path) -> None:
    texts = ["ab's a\nabc.", "3 a"] if kind == "gpt2" else TEXTS
    tokenizer.save_assets(str(tmp_path))
    loaded = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(tokenizer))
    with pytest.raises(ValueError, match="No vocabulary"):
        loaded("text")
    loaded.load_assets(str(tmp_path))
    assert loaded(texts) == tokenizer(texts)
    assert (loaded.start_token_id, loaded.end_token_id) == (
        tokenizer.start_token_id,
        tokenizer.end_token_id,
    )
    special = {"lossless": (1, 2), "default": (2, 2), "gpt2": (0, 0)}
    assert (tokenizer.start_token_id, tokenizer.end_token_id) == special[kind]
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == tokenizer.fingerprint


@pytest.mark.long
def test_gpt2_splits_words_as_gpt2_does(gpt2: ElitaGPT2Tokenizer) -> None:
    text = "ab's a\nabc."
    pieces = ["ab", "'s", "Ġa", "Ċ", "ab", "c", "."]
    assert [gpt2.id_to_token(token) for token in gpt2(text)] == pieces
    assert gpt2.encode(text).tolist() == gpt2(text)
    graph = tf.function(gpt2.tokenize)(tf.constant([text]))
    assert graph.to_list() == gpt2([text])


def in_a_graph(tokenizer: Any) -> Callable[[list], list[str]]:
    def texts(rows: list) -> list[str]:
        graph = tf.function(tokenizer.detokenize)
        return [text.decode() for text in graph(tf.ragged.constant(rows)).numpy()]

    return texts


@pytest.mark.parametrize("in_graph", [False, True])
def test_gpt2_shows_cut_characters_and_loses_no_byte_of_whole_ones(in_graph: bool) -> None:
    vocabulary = {"a": 0, "æ": 1, "Ĺ": 2, "¥": 3, "aa": 4, "<|endoftext|>": 5}
    tokenizer = ElitaGPT2Tokenizer(vocabulary, ["a a"])
    texts = in_a_graph(tokenizer) if in_graph else tokenizer.detokenize
    # Ids 1 to 3 are the bytes of U+65E5.
    assert texts([[0, 1, 2, 3], [0, 1], [1, 2, 0]]) == ["a\u65e5", "a\ufffd", "\ufffda"]
    assert tokenizer.detokenize([0, 1, 2, 3]) == "a\u65e5"


def test_gpt2_has_no_id_for_a_byte_that_its_vocabulary_lacks(gpt2: ElitaGPT2Tokenizer) -> None:
    with pytest.raises(ValueError, match="no id for some of the text"):
        gpt2("abz")


@ALL_KINDS
def test_texts_in_every_form(tokenizer: Any) -> None:
    texts = ["3 ab", "a", "ab.\nab"]
    rows = tokenizer(texts)
    assert all(type(token) is int for row in rows for token in row)
    for batch in (
        tuple(texts),
        [text.encode() for text in texts],
        np.array(texts),
        np.array(texts, dtype=object),
        np.array([text.encode() for text in texts]),
        tf.constant(texts),
    ):
        assert tokenizer(batch) == rows
    for scalar in (texts[0], texts[0].encode(), np.array(texts[0]), tf.constant(texts[0])):
        assert tokenizer(scalar) == rows[0]
    assert tokenizer([]) == []


NOT_TEXTS = [
    *(None, 3, float("nan"), {"text": "a"}, np.array([[5, 6]]), np.array([5, 6]), np.nan),
    *(["a", None], ["a", float("nan")], ["a", ["b"]], [["a"], ["b"]], np.array([["a"]])),
    *("\ud800", "a\udcffb", ["fine", "\ud800"], b"\xff", ["fine", b"\xff"]),
]


@ALL_KINDS
def test_what_is_not_a_text_is_refused(tokenizer: Any) -> None:
    for inputs in NOT_TEXTS:
        with pytest.raises(ValueError, match="Expected a string|A text is not Unicode"):
            tokenizer(inputs)
    for inputs in (tf.constant([5, 6]), tf.constant([["a"]])):
        with pytest.raises(ValueError, match="Expected strings of rank 0 or 1|Expected a string"):
            tf.function(tokenizer.tokenize)(inputs)
        with pytest.raises(ValueError, match="Expected a string"):
            tokenizer(inputs)


@ALL_KINDS
def test_ids_in_every_form(tokenizer: Any) -> None:
    texts = ["a", "3 a 4", "4"]
    rows = tokenizer(texts)
    for batch in (
        tuple(rows),
        [np.array(row) for row in rows],
        [tf.constant(row) for row in rows],
        tf.ragged.constant(rows),
    ):
        assert tokenizer.detokenize(batch) == texts
    square = [rows[0], rows[0]]
    for batch in (np.array(square), tf.constant(square), keras.ops.convert_to_tensor(square)):
        assert tokenizer.detokenize(batch) == texts[:1] * 2
    for row in (rows[1], np.array(rows[1], "uint16"), tf.constant(rows[1], tf.int64)):
        assert tokenizer.detokenize(row) == texts[1]
    assert tokenizer.detokenize([]) == "" and tokenizer.detokenize([[]]) == [""]
    assert tokenizer.detokenize(np.zeros((0, 3), int)) == []
    assert tokenizer.detokenize([rows[0], []]) == ["a", ""]
    ragged = tf.function(tokenizer.detokenize)
    for batch in (tf.constant(square), tf.ragged.constant(square)):
        assert ragged(batch).numpy().tolist() == [b"a"] * 2
    assert ragged(tf.constant(rows[0])).numpy() == b"a"


@ALL_KINDS
def test_what_are_not_ids_is_refused(tokenizer: Any) -> None:
    size = tokenizer.vocabulary_size()
    for token in (-1, size, 10**6):
        for ids in ([token], [[1], [2, token]], tf.constant([[2, token]])):
            with pytest.raises(ValueError, match=rf"from 0 to {size - 1}; received \[{token}\]"):
                tokenizer.detokenize(ids)
    for wrong in ([1.5], [True], "text", ["text"], None, np.zeros((1, 1, 1), int), [[[1]]]):
        with pytest.raises(ValueError, match="Expected token ids"):
            tokenizer.detokenize(wrong)


@pytest.mark.long
@ALL_KINDS
def test_rows_of_one_length(tokenizer: Any, kind: str) -> None:
    arguments = [tokenizer.proto] if kind != "gpt2" else [tokenizer.vocabulary, tokenizer.merges]
    padded = type(tokenizer)(*arguments, sequence_length=7)
    texts = ["3 ab\nab\n", "a", "ab. ab. ab. ab. ab. ab."]
    expected = [(row + [0] * 7)[:7] for row in tokenizer(texts)]
    received = padded(texts)
    assert received.dtype == "int32" and received.tolist() == expected
    assert tf.function(padded.tokenize)(tf.constant(texts)).numpy().tolist() == expected
    assert padded(texts[0]).tolist() == expected[0]
    assert tf.function(padded.tokenize)(tf.constant(texts[1])).numpy().tolist() == expected[1]
    assert padded.encode(texts[0]).tolist() == tokenizer.encode(texts[0]).tolist()


def test_options_that_would_give_wrong_ids_are_refused(tokenizers: dict) -> None:
    proto = tokenizers["lossless"].proto
    for option, instead in (("add_bos", "add_start_token"), ("add_eos", "add_end_token")):
        with pytest.raises(ValueError, match=f"`{option}`.*{instead}=True"):
            ElitaTokenizer(proto, **{option: True})
    with pytest.raises(ValueError, match="`dtype` of ElitaTokenizer.*'string'"):
        ElitaTokenizer(proto, dtype="string")
    with pytest.raises(ValueError, match="`dtype` of ElitaGPT2Tokenizer.*'string'"):
        ElitaGPT2Tokenizer({"a": 0, "aa": 1, "<|endoftext|>": 2}, ["a a"], dtype="string")
    with pytest.raises(ValueError, match="Received unknown type.*int"):
        ElitaTokenizer(3)
