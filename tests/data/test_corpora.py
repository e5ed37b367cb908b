import pytest

from elita_tf.data import SPLITS, Split, load_corpus


def test_split_reads_its_byte_range_line_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("skip\né\u2028b\r\n\nlast".encode())
    split = Split(path, start=5)
    assert list(split.lines()) == ["é\u2028b\r\n", "\n", "last"]
    assert split.num_bytes == len("é\u2028b\r\n\nlast".encode())
    assert list(Split(path, 0, 5).lines()) == ["skip\n"]


def test_words_are_whitespace_separated_plus_one_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" = One two = \n \n three , four .\n")
    assert Split(path).count_words() == 4 + 4 + 3


def test_digest_is_of_the_bytes_in_the_range(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("x\ny\nz\n")
    second.write_text("y\n")
    assert Split(first, 2, 4).digest() == Split(second).digest()
    assert Split(first).digest() != Split(second).digest()


def test_text_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"fine\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8.*line 2"):
        list(Split(path).lines())


def test_a_single_file_is_split_in_order_at_line_ends(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    corpus = load_corpus(f"text:{path}")
    parts = {name: list(corpus[name].lines()) for name in SPLITS}
    assert sum(parts.values(), []) == path.read_text().splitlines(keepends=True)
    shares = [corpus[name].num_bytes / path.stat().st_size for name in SPLITS]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.002)


def test_a_folder_of_three_files(tmp_path):
    for name in SPLITS:
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    corpus = load_corpus(f"text:{tmp_path}")
    assert [list(corpus[name].lines()) for name in SPLITS] == [["train\n"], ["valid\n"], ["test\n"]]
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.txt"):
        load_corpus(f"text:{tmp_path}")


def test_errors_say_what_is_allowed(tmp_path):
    with pytest.raises(ValueError, match="'wikitext'.*pydoc, wikitext-2, wikitext-103, text:PATH"):
        load_corpus("wikitext")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_corpus(f"text:{tmp_path / 'nowhere'}")
    (tmp_path / "one.txt").write_text("only one line\n")
    with pytest.raises(ValueError, match="no text for: valid, test"):
        load_corpus(f"text:{tmp_path / 'one.txt'}")
    with pytest.raises(ValueError, match="'validation'.*train, valid, test"):
        load_corpus("pydoc")["validation"]


def test_pydoc_is_split_by_topic_and_shares_no_paragraph(cache):
    corpus = load_corpus("pydoc")
    texts = {name: corpus[name].path.read_text() for name in SPLITS}
    total = sum(map(len, texts.values()))
    for name in ("valid", "test"):
        assert 0.04 < len(texts[name]) / total <= 0.051
    paragraphs = {
        name: {p.strip() for p in text.split("\n\n") if len(p.strip()) >= 80}
        for name, text in texts.items()
    }
    assert not paragraphs["train"] & (paragraphs["valid"] | paragraphs["test"])
    assert not paragraphs["valid"] & paragraphs["test"]
    assert sum(map(len, paragraphs.values())) > 500


def test_pydoc_keeps_all_of_the_text(cache):
    from pydoc_data.topics import topics

    corpus = load_corpus("pydoc")
    kept = {p.strip() for name in SPLITS for p in corpus[name].path.read_text().split("\n\n")}
    assert {p.strip() for text in topics.values() for p in text.split("\n\n")} <= kept
