"""What a hub can do wrong: a small one on this machine, and the real `huggingface_hub`."""

import hashlib
import http.server
import threading

import huggingface_hub
import pytest

from elita_tf.data import gpt2, wikitext
from elita_tf.data.cache import hub_file
from elita_tf.files import file_sha256

CONTENT = bytes(range(256)) * 40
SUM = hashlib.sha256(CONTENT).hexdigest()
REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.ThreadingHTTPServer):
    """Serves CONTENT as any file; `answers` says, one after the other, how each GET goes wrong."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.answers, self.requests, self.status = [], 0, 200
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def begin(self, status, length):
        self.send_response(status)
        self.send_header("ETag", '"etag"')
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()

    def do_HEAD(self):  # noqa: N802, named by http.server
        self.begin(self.server.status, len(CONTENT))

    def do_GET(self):  # noqa: N802
        fault = self.server.answers.pop(0) if self.server.answers else None
        self.server.requests += 1
        content = {
            "tampered": CONTENT[::-1],
            "oversized": CONTENT + b"more",
            "cut short": CONTENT[:-1],
        }.get(fault, CONTENT)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.begin(206 if start else 200, len(content) - start)
        content = content[start:]
        self.wfile.write(content[: len(content) // 2] if fault == "interrupted" else content)


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    huggingface_hub.close_session()
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()
    huggingface_hub.close_session()


@pytest.fixture
def fetch(hub, tmp_path):
    where = {"revision": REVISION, "endpoint": hub.url, "cache_dir": tmp_path / "hub"}
    return lambda: hub_file("owner/name", "a.bin", SUM, "pass a folder", **where)


def test_a_download_that_is_interrupted_is_tried_again(hub, fetch):
    hub.answers = ["interrupted"] * 2
    assert fetch().read_bytes() == CONTENT
    assert hub.requests == 3


def test_a_download_that_is_cut_short_for_good_leaves_nothing(hub, fetch):
    hub.answers = ["cut short"]
    with pytest.raises(OSError, match=r"(?s)a\.bin of owner/name.*pass a folder"):
        fetch()
    assert fetch().read_bytes() == CONTENT


def test_a_tampered_download_is_fetched_once_more(hub, fetch):
    hub.answers = ["tampered"]
    assert fetch().read_bytes() == CONTENT
    assert fetch().read_bytes() == CONTENT and hub.requests == 2


def test_a_download_that_stays_tampered_is_refused_and_says_what_to_do(hub, fetch):
    hub.answers = ["tampered"] * 2
    with pytest.raises(ValueError, match=rf"(?s)a\.bin.*expected {SUM}.*pass a folder"):
        fetch()
    assert hub.requests == 2
    assert fetch().read_bytes() == CONTENT


def test_an_oversized_download_is_refused(hub, fetch):
    hub.answers = ["oversized"]
    with pytest.raises(OSError, match=r"(?s)a\.bin of owner/name.*pass a folder"):
        fetch()
    assert fetch().read_bytes() == CONTENT


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_hub_that_refuses(hub, fetch, status):
    hub.status = status
    with pytest.raises(OSError, match=r"(?s)a\.bin of owner/name.*network, or pass a folder"):
        fetch()


def test_offline_what_is_there_is_used_and_what_is_not_is_named(hub, fetch, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"(?s)a\.bin.*network, or pass a folder"):
        fetch()
    monkeypatch.undo()
    path = fetch()
    hub.status = 500
    assert fetch() == path
    path.write_bytes(b"harmed")
    with pytest.raises(OSError, match=r"(?s)a\.bin.*network, or pass a folder"):
        fetch()


def test_a_file_that_was_harmed_in_the_hubs_cache_is_fetched_again(hub, fetch):
    path = fetch()
    path.write_bytes(CONTENT[:100])
    assert fetch().read_bytes() == CONTENT and hub.requests == 2


def test_a_disk_that_fills_up_during_the_download(hub, fetch):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(CONTENT) // 3, before[1]))
    try:
        with pytest.raises(OSError, match=r"a\.bin.*File too large"):
            fetch()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert fetch().read_bytes() == CONTENT


def test_gpt2s_files_of_the_cache_are_checked(cache, tmp_path, monkeypatch):
    requested = []

    def served(repository, name, **where):
        requested.append(name)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", served)
    for name in gpt2.CHECKSUMS:
        (tmp_path / name).write_text(name)
        monkeypatch.setitem(gpt2.CHECKSUMS, name, file_sha256(tmp_path / name))
    folder = gpt2.download_gpt2_files()
    (folder / "vocab.json").write_text("harmed")
    assert (gpt2.download_gpt2_files() / "vocab.json").read_text() == "vocab.json"
    gpt2.download_gpt2_files()
    assert requested == ["vocab.json", "merges.txt", "vocab.json"]


def test_a_raw_file_of_the_cache_that_was_cut_short_is_fetched_again(cache, monkeypatch):
    sizes = {"train": 5, "valid": 6, "test": 4}
    monkeypatch.setitem(wikitext.NUM_BYTES, "wikitext-2", sizes)
    made = []

    def download(name, split, path):
        made.append(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * sizes[split])

    monkeypatch.setattr(wikitext, "_download", download)
    paths = wikitext.find("wikitext-2")
    paths["valid"].write_bytes(b"xx")
    wikitext.find("wikitext-2")
    assert made == ["train", "valid", "test", "valid"]
