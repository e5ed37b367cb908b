import json

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elita_tf.data import (
    ElitaGPT2Tokenizer,
    ElitaTokenizer,
    Split,
    load_corpus,
    load_tokenizer,
    make_tokenizer,
)
from tests.helpers import budget

AWKWARD = " \n  two  spaces \r\n\t \u2581 mark\u2581\u2581\x00 é e\u0301 \u2028 😀 <s> </s>\n\nend"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELITA_TF_HOME", str(tmp_path_factory.mktemp("corpus")))
        yield load_corpus("pydoc")


@pytest.fixture(scope="module")
def models(corpus, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELITA_TF_HOME", str(tmp_path_factory.mktemp("models")))
        kinds = ("sentencepiece", "sentencepiece-default")
        yield {kind: make_tokenizer(kind, corpus["train"], vocabulary_size=512) for kind in kinds}


def test_lossless_on_a_text_it_has_not_seen(models, corpus):
    text = corpus["test"].path.read_text()
    tokenizer = models["sentencepiece"]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.detokenize(ids) == text
    assert len(ids) < len(text) / 1.5
    assert tokenizer.vocabulary_size() == 512


@settings(budget(60, 3000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from(AWKWARD))))
def test_lossless_on_any_text(models, text):
    tokenizer = models["sentencepiece"]
    assert tokenizer.detokenize(tokenizer.encode(text)) == text


def test_lossless_on_awkward_text(models):
    tokenizer = models["sentencepiece"]
    assert tokenizer.detokenize(tokenizer.encode(AWKWARD)) == AWKWARD
    assert tokenizer.end_of_text == ()


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-default"])
def test_a_text_is_encoded_line_by_line(models, kind):
    tokenizer = models[kind]
    lines = ["first line\n", "\n", "  second"]
    expected = np.concatenate([tokenizer.encode_lines([line]) for line in lines])
    np.testing.assert_array_equal(tokenizer.encode("".join(lines)), expected)
    assert tokenizer.encode("").shape == (0,)


def test_the_default_form_has_one_token_a_line_end(models):
    tokenizer = models["sentencepiece-default"]
    (line_end,) = tokenizer.end_of_text
    ids = tokenizer.encode(" The  statement \n\nends here")
    assert np.count_nonzero(ids == line_end) == 2
    assert tokenizer.detokenize(ids) == "The statement\n\nends here"


@pytest.fixture
def cats_then_zebras(tmp_path):
    """A training split that is followed by held-out text with letters of its own."""
    path = tmp_path / "a.txt"
    training = "".join(f"the cat {i} sat on mat {i % 7}\n" for i in range(400))
    path.write_text(training + "zebra zygote\n" * 400)
    return Split(path, 0, len(training))


def test_held_out_letters_are_unknown(cats_then_zebras):
    tokenizer = make_tokenizer("sentencepiece-default", cats_then_zebras, vocabulary_size=40)
    assert tokenizer.detokenize(tokenizer.encode("the cat sat")) == "the cat sat"
    assert "z" not in tokenizer.detokenize(tokenizer.encode("the zebra"))


def test_models_are_cached_by_text_and_settings(cats_then_zebras, cache, monkeypatch):
    first = make_tokenizer("sentencepiece", cats_then_zebras, vocabulary_size=300)
    (stored,) = (cache / "tokenizers").iterdir()
    stamp = stored.stat().st_mtime_ns
    again = make_tokenizer("sentencepiece", cats_then_zebras, vocabulary_size=300)
    assert again.fingerprint == first.fingerprint
    assert stored.stat().st_mtime_ns == stamp
    make_tokenizer("sentencepiece", cats_then_zebras, vocabulary_size=301)
    make_tokenizer("sentencepiece", Split(cats_then_zebras.path), vocabulary_size=300)
    assert len(list((cache / "tokenizers").iterdir())) == 3


def test_a_long_text_is_thinned_evenly(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{'even' if i % 2 == 0 else 'quiz'} word {i}\n" for i in range(600)))
    monkeypatch.setattr("elita_tf.data.tokenizers.MAX_TRAINING_BYTES", path.stat().st_size - 1)
    tokenizer = make_tokenizer("sentencepiece-default", Split(path), vocabulary_size=30)
    assert tokenizer.detokenize(tokenizer.encode("even word 24")) == "even word 24"
    assert "q" not in tokenizer.detokenize(tokenizer.encode("quiz word 24"))


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-default"])
def test_save_and_load(models, kind, tmp_path):
    models[kind].save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, ElitaTokenizer)
    assert loaded.fingerprint == models[kind].fingerprint
    np.testing.assert_array_equal(loaded.encode(AWKWARD), models[kind].encode(AWKWARD))


def test_errors(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too little\n")
    with pytest.raises(ValueError, match=r"could not learn 5000 pieces from .*short\.txt"):
        make_tokenizer("sentencepiece", Split(path), vocabulary_size=5000)
    with pytest.raises(ValueError, match="'bpe'.*sentencepiece, sentencepiece-default, gpt2"):
        make_tokenizer("bpe", Split(path))
    with pytest.raises(FileNotFoundError, match=r"vocab\.json"):
        load_tokenizer(tmp_path)


@pytest.fixture
def gpt2_folder(tmp_path):
    return gpt2_files(tmp_path)


def gpt2_files(tmp_path):
    """Byte pieces and a few merges, in GPT-2's own files."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    pieces = [chr(byte) for byte in printable]
    pieces += [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["t h", "th e", "Ġ the", "' s"]
    pieces += [merge.replace(" ", "") for merge in merges] + ["<|endoftext|>"]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """One tokenizer for all the texts of a test."""
    return load_tokenizer(gpt2_files(tmp_path_factory.mktemp("gpt2")))


def test_gpt2_merges_in_order_and_keeps_every_byte(gpt2_folder, tmp_path):
    tokenizer = make_tokenizer("gpt2", Split(gpt2_folder / "merges.txt"), folder=gpt2_folder)
    vocabulary = json.loads((gpt2_folder / "vocab.json").read_text(encoding="utf-8"))
    text = "the theme, the cat's\n\n é 😀 \u2581\n"
    ids = tokenizer.encode(text)
    assert ids[:4].tolist() == [vocabulary[p] for p in ("the", "Ġthe", "m", "e")]
    assert vocabulary["'s"] in ids
    assert tokenizer.detokenize(ids) == text
    assert tokenizer.vocabulary_size() == 261
    assert tokenizer.encode("").shape == (0,)


@settings(budget(60, 3000), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(codec="utf-8")), max_size=60))
@example(["a\u096cb", "a\0b c\n"])
def test_gpt2_is_lossless_on_any_text(gpt2, texts):
    assert gpt2.detokenize(gpt2.encode_lines(texts)) == "".join(texts)


def test_gpt2_save_and_load(gpt2_folder, tmp_path):
    tokenizer = load_tokenizer(gpt2_folder)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert isinstance(loaded, ElitaGPT2Tokenizer)
    assert loaded.fingerprint == tokenizer.fingerprint


def test_only_graphs_need_tensorflow_text(models, gpt2_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("keras_hub.src.utils.tensor_utils.tf_text", None)
    for kind, tokenizer in models.items():
        tokenizer.save(tmp_path / kind)
    for folder in (*map(tmp_path.joinpath, models), gpt2_folder):
        tokenizer = load_tokenizer(folder)
        assert tokenizer.detokenize(tokenizer.encode("the cat")) == "the cat"
        assert tokenizer.detokenize(tokenizer(["the cat"])) == ["the cat"]
        with pytest.raises(ImportError, match="requires `tensorflow` and `tensorflow-text`"):
            tf.function(tokenizer.tokenize, autograph=False)(tf.constant(["the cat"]))


def test_gpt2_download_is_checked(gpt2_folder, cache, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repository, name, **where: str(gpt2_folder / name),
    )
    with pytest.raises(ValueError, match="expected 1961396"):
        make_tokenizer("gpt2", Split(gpt2_folder / "merges.txt"))
    assert not (cache / "tokenizers" / "gpt2" / "vocab.json").exists()


def test_gpt2_without_a_network_says_what_to_do(gpt2_folder, cache, monkeypatch):
    def offline(*arguments, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(OSError, match=r"vocab\.json.*no route.*tokenizer_folder"):
        make_tokenizer("gpt2", Split(gpt2_folder / "merges.txt"))
