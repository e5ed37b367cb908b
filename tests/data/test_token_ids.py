import logging
import math

import numpy as np
import pytest

from elita_tf.data import Split, encode_split, make_tokenizer, unigram_entropy
from elita_tf.data import token_ids as module


@pytest.fixture
def split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of the text\n" for i in range(300)))
    return Split(path)


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-default"])
def test_stored_ids_are_those_of_the_text(split, kind, cache, monkeypatch, caplog):
    monkeypatch.setattr(module, "LINES_PER_BLOCK", 7)
    tokenizer = make_tokenizer(kind, split, vocabulary_size=300 if kind == "sentencepiece" else 40)
    with caplog.at_level(logging.INFO, "elita_tf"):
        ids = encode_split(tokenizer, split)
    expected = [*tokenizer.encode(split.path.read_text()), *tokenizer.end_of_text]
    np.testing.assert_array_equal(ids, expected)
    assert isinstance(ids, np.memmap)
    assert ids.dtype == np.uint16
    assert not ids.flags.writeable
    assert "100 %" in caplog.text
    assert len(list((cache / "token_ids").iterdir())) == 1


def test_the_second_time_reads_the_file(split, monkeypatch):
    tokenizer = make_tokenizer("sentencepiece", split, vocabulary_size=300)
    first = encode_split(tokenizer, split)

    def refuse(lines):
        raise RuntimeError("encoded again")

    monkeypatch.setattr(tokenizer, "encode_lines", refuse)
    np.testing.assert_array_equal(encode_split(tokenizer, split), first)
    with pytest.raises(RuntimeError, match="encoded again"):
        encode_split(tokenizer, Split(split.path, 0, 11))


def test_an_interrupted_encoding_leaves_no_file(split, cache, monkeypatch):
    tokenizer = make_tokenizer("sentencepiece", split, vocabulary_size=300)

    def interrupt(lines):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "encode_lines", interrupt)
    with pytest.raises(KeyboardInterrupt):
        encode_split(tokenizer, split)
    assert not list((cache / "token_ids").iterdir())


def test_a_large_vocabulary_is_stored_in_32_bits(split):
    tokenizer = make_tokenizer("sentencepiece", split, vocabulary_size=300)

    class Large(type(tokenizer)):
        def vocabulary_size(self):
            return 70_000

        def encode_lines(self, lines):
            return np.full(len(lines), 69_999, np.int32)

    tokenizer.__class__ = Large
    ids = encode_split(tokenizer, split)
    assert ids.dtype == np.uint32
    assert ids.tolist() == [69_999] * 300


def test_no_token_is_an_error(tmp_path, split):
    tokenizer = make_tokenizer("sentencepiece", split, vocabulary_size=300)
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.txt gives no token"):
        encode_split(tokenizer, Split(empty))


def test_unigram_entropy(monkeypatch):
    ids = np.array([0] * 4 + [1] * 2 + [3] * 2, np.uint16)
    assert unigram_entropy(ids, 5) == pytest.approx(1.5 * math.log(2))
    monkeypatch.setattr(module, "COUNTED_PER_BLOCK", 3)
    assert unigram_entropy(ids, 5) == pytest.approx(1.5 * math.log(2))
