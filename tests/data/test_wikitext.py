import sys

import pytest

from elita_tf.data import SPLITS, load_corpus, wikitext
from elita_tf.files import file_sha256

ROWS = {
    "train": ["", " = Title = \n", "", " Some text é . \n"],
    "valid": ["", " Valid . \n"],
    "test": [" Test . \n", ""],
}
RAW = {
    "train": " \n = Title = \n \n Some text é . \n",
    "valid": " \n Valid . \n",
    "test": " Test . \n \n",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for huggingface_hub: small parquet files, with their sums and lengths pinned."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    requests = []
    pins = {}
    for split, rows in ROWS.items():
        path = tmp_path / "hub" / f"{split}.parquet"
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table({"text": rows}), path)
        pins[split] = (wikitext.Parquet(path.name, file_sha256(path)),)

    def download(repository, name, *, revision, repo_type, force_download=False):
        requests.append((repository, name, revision, repo_type))
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setitem(wikitext.PARQUETS, "wikitext-2", pins)
    lengths = {split: len(text.encode()) for split, text in RAW.items()}
    monkeypatch.setitem(wikitext.NUM_BYTES, "wikitext-2", lengths)
    return requests


def test_the_download_is_pinned_restored_and_cached(hub, cache):
    corpus = load_corpus("wikitext-2")
    assert {split: corpus[split].path.read_text() for split in SPLITS} == RAW
    assert corpus["train"].path == cache / "corpora" / "wikitext-2" / "wiki.train.raw"
    revision = "b08601e04326c79dfdd32d625aee71d232d685c3"
    assert hub[0] == ("Salesforce/wikitext", "train.parquet", revision, "dataset")
    assert len(hub) == 3
    load_corpus("wikitext-2")
    assert len(hub) == 3


def test_a_wrong_sum_stops(hub, cache, monkeypatch):
    wrong = dict(wikitext.PARQUETS["wikitext-2"], valid=(wikitext.Parquet("test.parquet", "0"),))
    monkeypatch.setitem(wikitext.PARQUETS, "wikitext-2", wrong)
    with pytest.raises(ValueError, match="expected 0"):
        load_corpus("wikitext-2")
    assert not (cache / "corpora" / "wikitext-2" / "wiki.valid.raw").exists()


def test_a_wrong_length_stops_and_leaves_no_file(hub, cache, monkeypatch):
    monkeypatch.setitem(wikitext.NUM_BYTES["wikitext-2"], "train", 12)
    with pytest.raises(ValueError, match="expected 12"):
        load_corpus("wikitext-2")
    assert not list((cache / "corpora" / "wikitext-2").iterdir())


def test_a_download_without_pyarrow_names_the_extra(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'elita_tf\[wikitext\]'"):
        load_corpus("wikitext-2")


def test_a_local_folder_is_used_as_it_is(tmp_path, caplog):
    for split, text in RAW.items():
        (tmp_path / f"wiki.{split}.raw").write_text(text)
    corpus = load_corpus("wikitext-103", tmp_path)
    assert "".join(corpus["test"].lines()) == RAW["test"]
    assert "wikitext-103 has 1290590" in caplog.text
    (tmp_path / "wiki.test.raw").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks wiki\.test\.raw"):
        load_corpus("wikitext-103", tmp_path)


def test_the_pins_cover_both_corpora():
    assert list(wikitext.PARQUETS) == list(wikitext.NAMES)
    assert len(wikitext.PARQUETS["wikitext-103"]["train"]) == 2
    sums = {p.sha256 for files in wikitext.PARQUETS.values() for f in files.values() for p in f}
    assert len(sums) == 5
    assert {len(value) for value in sums} == {64}


def test_without_a_network_it_says_what_to_do(hub, cache, monkeypatch):
    def offline(*arguments, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(OSError, match=r"train\.parquet.*no route.*data_dir"):
        load_corpus("wikitext-2")
