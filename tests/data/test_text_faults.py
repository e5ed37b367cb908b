"""Texts that hardly are texts, and arguments that do not fit: a defined result or an error."""

import json

import numpy as np
import pytest

from elita_tf.data import (
    ElitaTokenizer,
    Split,
    encode_split,
    evaluation_windows,
    load_corpus,
    load_tokenizer,
    make_tokenizer,
    stream_windows,
    tokenizers,
    training_windows,
    unigram_entropy,
)

TEXT = "".join(f"the cat {i} sat on mat {i % 7}\n" for i in range(400)).encode()
IDS = np.arange(40, dtype=np.uint16)


def split_of(folder, content):
    path = folder / "a.txt"
    path.write_bytes(content)
    return Split(path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELITA_TF_HOME", str(folder))
        return make_tokenizer("sentencepiece", split_of(folder, TEXT), vocabulary_size=300)


@pytest.mark.parametrize(
    "content",
    [
        TEXT + b"a\0b\0\0c\n\0\n",
        TEXT.replace(b"\n", b"\r\n"),
        TEXT.replace(b"\n", b"\r"),
        b"\xef\xbb\xbf" + TEXT,
        TEXT.replace(b"\n", b"\n\n\n"),
        TEXT.removesuffix(b"\n"),
    ],
    ids=["NUL", "CRLF", "CR alone: one line", "byte order mark", "blank lines", "no last line end"],
)
def test_awkward_texts_are_learnt_from_and_kept_to_the_byte(tmp_path, content):
    split = split_of(tmp_path, content)
    tokenizer = make_tokenizer("sentencepiece", split, vocabulary_size=300)
    assert tokenizer.detokenize(encode_split(tokenizer, split)).encode() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "could not learn 300"),
        (b"\n" * 1000, "could not learn 300"),
        (b"\0\n" * 1000, "could not learn 300"),
        (b"one short line", "could not learn 300.*too high"),
        (TEXT + b"caf\xe9\n", r"a\.txt is not UTF-8.*line 401"),
        (b"\xff\xfe" + TEXT.decode().encode("utf-16-le"), r"a\.txt is not UTF-8.*line 1"),
    ],
    ids=["no line", "line ends", "NUL alone", "one line", "Latin-1", "UTF-16"],
)
def test_texts_that_cannot_be_learnt_from(tmp_path, cache, content, message):
    with pytest.raises(ValueError, match=message):
        make_tokenizer("sentencepiece", split_of(tmp_path, content), vocabulary_size=300)
    assert not list(cache.rglob("*.model"))


def test_a_line_longer_than_the_limit_is_left_out_of_learning_and_encoded(
    tmp_path, monkeypatch, tokenizer
):
    line = b"quiz " * 4_000
    monkeypatch.setattr(tokenizers, "MAX_TRAINING_BYTES", len(TEXT) + len(line))
    both = split_of(tmp_path, TEXT + line + b"\n")
    assert tokenizer.detokenize(encode_split(tokenizer, both)).encode() == TEXT + line + b"\n"
    monkeypatch.setattr(tokenizers, "MAX_TRAINING_BYTES", len(line) // 2)
    with pytest.raises(ValueError, match=f"break up lines.*more than {len(line) // 2} bytes"):
        make_tokenizer("sentencepiece", split_of(tmp_path, line), vocabulary_size=300)


@pytest.mark.soak  # a minute and 2 GB
def test_a_line_of_fifty_megabytes(tmp_path):
    words = np.random.default_rng(0).choice(TEXT.split(), 13_000_000)
    line = b" ".join(words.tolist())[: 50 << 20]
    assert len(line) > 40e6 and b"\n" not in line
    split = split_of(tmp_path, line)
    tokenizer = make_tokenizer("sentencepiece", split, vocabulary_size=300)
    assert tokenizer.detokenize(encode_split(tokenizer, split)).encode() == line


def test_a_corpus_needs_a_line_for_every_split(tmp_path):
    for content in (b"", b"one line", b"x" * 100_000):
        path = split_of(tmp_path, content).path
        with pytest.raises(ValueError, match=r"no text for: .*valid, test.*more lines"):
            load_corpus(f"text:{path}")
    with pytest.raises(ValueError, match="Unknown corpus None"):
        load_corpus(None)


def test_a_file_that_was_cut_after_it_was_split_is_no_endless_loop(tmp_path):
    path = split_of(tmp_path, TEXT).path
    train = load_corpus(f"text:{path}")["train"]
    path.write_bytes(TEXT[:1000])
    for read in (train.digest, train.count_words, lambda: list(train.lines())):
        with pytest.raises(ValueError, match=r"a\.txt ends .* before the split"):
            read()


@pytest.mark.parametrize("size", [0, -1, 3, 10**6, 10**10, 2.5, "300", None, True])
def test_a_vocabulary_that_cannot_be(tmp_path, cache, size):
    with pytest.raises(ValueError, match=rf"{size!r}|vocabulary_size"):
        make_tokenizer("sentencepiece", split_of(tmp_path, TEXT), vocabulary_size=size)
    assert not list(cache.rglob("*.model"))


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb\n", b"\xff", None, 3])
def test_what_is_no_text_is_not_encoded(tokenizer, text):
    with pytest.raises(ValueError, match="not Unicode|Expected a string"):
        tokenizer.encode(text)


@pytest.mark.parametrize("token", [-1, 300, 10**12])
def test_ids_that_the_vocabulary_lacks(tokenizer, token):
    with pytest.raises(ValueError, match=rf"from 0 to 299; received \[{token}\]"):
        tokenizer.detokenize([5, token])
    if token > 0 and token < 10**6:
        with pytest.raises(ValueError, match="below 300.*received 300"):
            unigram_entropy(np.array([5, token]), 300)


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_saved_tokenizer_that_was_cut_short(tokenizer, tmp_path, keep):
    tokenizer.save(tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match="SentencePiece `.model` file.*cut short"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="something else"):
        ElitaTokenizer(b"something else")


VOCABULARY = json.dumps({token: i for i, token in enumerate([*"ab", "Ċ", "ab", "<|endoftext|>"])})
MERGES = "#version: 0.2\na b\n"


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [
        (VOCABULARY[:20], MERGES),
        ("[1, 2]", MERGES),
        ("", MERGES),
        (VOCABULARY, ""),
        (VOCABULARY, "#version: 0.2\nab\n"),
        (VOCABULARY, "#version: 0.2\na b c\n"),
        (VOCABULARY, "#version: 0.2\nq z\n"),
    ],
)
def test_broken_files_of_gpt2(tmp_path, vocabulary, merges):
    (tmp_path / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path.name} does not hold .*Copy"):
        load_tokenizer(tmp_path)


def test_a_text_that_a_vocabulary_lacks_is_not_stored(tmp_path, cache, tokenizer, monkeypatch):
    for wrong in (-1, 300):
        monkeypatch.setattr(
            tokenizer, "encode_lines", lambda lines, wrong=wrong: np.array([3, wrong])
        )
        with pytest.raises(ValueError, match=rf"no id for some text of .*a\.txt.* {wrong}"):
            encode_split(tokenizer, split_of(tmp_path, TEXT))
    assert not list((cache / "token_ids").iterdir())


WINDOWS = {
    "training": lambda ids, **sizes: training_windows(ids, seed=0, **sizes),
    "stream": stream_windows,
    "evaluation": evaluation_windows,
}


@pytest.mark.parametrize("make", WINDOWS.values(), ids=WINDOWS)
def test_windows_that_cannot_be_cut(make):
    for argument in ("context_length", "batch_size"):
        for size in (0, -1, 2.5, "4", None, True):
            sizes = {"context_length": 4, "batch_size": 2, argument: size}
            with pytest.raises(ValueError, match=rf"`{argument}`.*received {size!r}"):
                make(IDS, **sizes)
    for ids in (IDS[None], IDS / 2, IDS.tolist(), None, "text"):
        with pytest.raises(ValueError, match="`token_ids`.*rank 1, received"):
            make(ids, context_length=4, batch_size=2)


def test_a_split_shorter_than_one_window():
    sizes = {"context_length": 100, "batch_size": 2}
    with pytest.raises(ValueError, match="40 token ids give 0 windows of 101"):
        training_windows(IDS, seed=0, **sizes)
    with pytest.raises(ValueError, match="40 token ids are fewer than the 202"):
        stream_windows(IDS, **sizes)
    ((inputs, labels, weights),) = evaluation_windows(IDS, **sizes)
    assert labels.numpy()[0, :39].tolist() == IDS[1:].tolist() and weights.numpy().sum() == 39
    with pytest.raises(ValueError, match="`start_step`.*-1"):
        stream_windows(IDS, context_length=4, batch_size=2, start_step=-1)
