"""Which document an id is of, and windows that tell documents apart."""

import numpy as np
import pytest

from elita_tf.data import (
    Split,
    Tokenizer,
    document_ids,
    encode_split,
    evaluation_windows,
    pack_windows,
    stream_windows,
    training_windows,
)
from elita_tf.data.documents import split_documents

TEXT = " \n = Ab = \n \none two\n = = Cd = = \nthree\n \n = E = \n \nfour\n"
EXPECTED = {
    "article": [" \n", " = Ab = \n \none two\n = = Cd = = \nthree\n \n", " = E = \n \nfour\n"],
    "paragraph": [
        *(" \n", " = Ab = \n \n", "one two\n = = Cd = = \nthree\n \n", " = E = \n \n", "four\n")
    ],
    "line": TEXT.splitlines(keepends=True),
}


class Characters(Tokenizer):
    """A token for every character, and one that ends the text."""

    end_of_text = (0,)

    def vocabulary_size(self):
        return 128

    def files(self):
        return {"characters.txt": b"ASCII"}

    def encode_texts(self, texts):
        return [list(text.encode()) for text in texts]


@pytest.fixture
def split(tmp_path, monkeypatch):
    monkeypatch.setenv("ELITA_TF_HOME", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return Split(path)


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_text_falls_into_documents(kind):
    documents = split_documents(TEXT.splitlines(keepends=True), kind)
    assert ["".join(lines) for lines in documents] == EXPECTED[kind]


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_id_knows_its_document(split, kind):
    documents = document_ids(Characters(), split, kind)
    lengths = [len(document) for document in EXPECTED[kind]]
    lengths[-1] += 1  # the id that ends the text
    np.testing.assert_array_equal(documents, np.repeat(np.arange(len(lengths)), lengths))
    assert len(documents) == len(encode_split(Characters(), split))
    assert documents.filename == document_ids(Characters(), split, kind).filename


def test_an_unknown_kind_of_document(split):
    with pytest.raises(ValueError, match="'chapter': expected article, paragraph, line"):
        document_ids(Characters(), split, "chapter")


IDS, DOCUMENTS = np.arange(100, 141), np.repeat(np.arange(5), [1, 9, 14, 2, 15])


@pytest.mark.parametrize(
    "windows",
    [
        lambda ids: training_windows(ids, context_length=4, batch_size=3, seed=7, start_step=1),
        lambda ids: stream_windows(ids, context_length=4, batch_size=3, start_step=2),
        lambda ids: evaluation_windows(ids, context_length=4, batch_size=3),
    ],
    ids=["training", "stream", "evaluation"],
)
def test_windows_know_the_document_of_every_id(windows):
    packed = pack_windows(windows(IDS), windows(DOCUMENTS))
    dropped = 0
    for (plain, plain_labels, *given), (inputs, labels, weights) in zip(
        windows(IDS).take(4), packed.take(4), strict=True
    ):
        np.testing.assert_array_equal(inputs["token_ids"], plain["token_ids"])
        np.testing.assert_array_equal(labels, plain_labels)
        real = np.ones(labels.shape, bool) if not given else given[0].numpy() == 1
        own = DOCUMENTS[inputs["token_ids"].numpy()[real] - 100]
        np.testing.assert_array_equal(inputs["segment_ids"].numpy()[real], own)
        kept = own == DOCUMENTS[labels.numpy()[real] - 100]
        np.testing.assert_array_equal(weights.numpy()[real], kept)
        assert not weights.numpy()[~real].any()
        dropped += (~kept).sum()
    assert dropped >= 3
