"""Full disks, killed and competing writers, files cut short: the cache is whole or says what is.

A test counts no fault that it does not see: every fault is checked to have happened.
"""

import errno
import subprocess
import sys
import threading

import numpy as np
import pytest

from elita_tf import files as module
from elita_tf.data import Split, encode_split, load_corpus, make_tokenizer
from elita_tf.data.cache import cached_file
from elita_tf.files import atomic_path

resource = pytest.importorskip("resource")

# Loads the module alone: a child that imported the package would take seconds to start.
LOADED = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {str(module.__file__)!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
target = Path(sys.argv[1])
"""
COMPETING = """
import select
while not select.select([sys.stdin], [], [], 0)[0]:
    with files.atomic_path(target) as temporary:
        temporary.write_bytes(sys.argv[2].encode() * 100_000)
"""
KILLED = """
with files.atomic_path(target) as temporary, temporary.open("wb") as file:
    file.write(b"half")
    file.flush()
    print("half", flush=True)
    sys.stdin.read()
"""


def child(code, *arguments):
    command = [sys.executable, "-c", LOADED + code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def full_disk():
    """A function that lets no file grow beyond so many bytes until the test ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def split(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of the text\n" for i in range(300)))
    return Split(path)


@pytest.fixture
def tokenizer(split):
    return make_tokenizer("sentencepiece", split, vocabulary_size=300)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_leaves_the_former_file_and_names_the_new_one(tmp_path, full_disk):
    target = tmp_path / "a"
    target.write_bytes(b"former")
    full_disk(1000)
    message = r"no room for .*a \(File too large\).*ELITA_TF_HOME"
    with pytest.raises(OSError, match=message) as caught, atomic_path(target) as temporary:
        temporary.write_bytes(b"x" * 1001)
    assert caught.value.errno == errno.EFBIG
    assert files(tmp_path) == [target] and target.read_bytes() == b"former"


def test_another_error_of_the_system_is_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), atomic_path(tmp_path / "a"):
        (tmp_path / "nowhere").read_bytes()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), atomic_path(tmp_path / "folder") as temporary:
        temporary.write_bytes(b"x")
    assert files(tmp_path) == []


@pytest.mark.parametrize("what", ["corpus", "tokenizer", "token ids"])
def test_a_disk_that_fills_up_leaves_nothing_to_be_taken_for_whole(
    what, split, tokenizer, cache, full_disk
):
    make = {
        "corpus": lambda: load_corpus("pydoc")["train"].digest(),
        "tokenizer": lambda: (
            make_tokenizer("sentencepiece", split, vocabulary_size=301).fingerprint
        ),
        "token ids": lambda: encode_split(tokenizer, split).tolist(),
    }[what]
    before = files(cache)
    full_disk(4000)
    with pytest.raises(OSError, match="no room for"):
        make()
    assert files(cache) == before
    full_disk(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    first = make()
    assert make() == first and len(files(cache)) > len(before)


def test_a_writer_that_is_killed_leaves_the_former_file(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"former")
    with child(KILLED, target) as writer:
        assert writer.stdout.readline() == "half\n"
        writer.kill()
    (temporary,) = set(files(tmp_path)) - {target}
    assert temporary.read_bytes() == b"half" and target.read_bytes() == b"former"
    assert cached_file(target, lambda path: path.write_bytes(b"new")).read_bytes() == b"new"


def test_processes_that_write_at_once_never_show_a_part(tmp_path):
    target = tmp_path / "a"
    target.write_bytes(b"z" * 100_000)
    seen = []
    with child(COMPETING, target, "x") as first, child(COMPETING, target, "y") as second:
        while len(seen) < 300 or not {b"x", b"y"} <= set(seen):
            assert first.poll() is None and second.poll() is None
            content = target.read_bytes()
            assert len(content) == 100_000 and content == content[:1] * 100_000
            seen.append(content[:1])
        first.stdin.close()
        second.stdin.close()
    assert first.returncode == second.returncode == 0
    assert files(tmp_path) == [target]


def test_threads_that_need_the_same_file_at_once_all_get_it(tmp_path):
    barrier, contents = threading.Barrier(4), []

    def write(path):
        barrier.wait(timeout=30)
        path.write_bytes(b"x" * 10_000)
        barrier.wait(timeout=30)

    def work():
        contents.append(cached_file(tmp_path / "a.bin", write).read_bytes())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert contents == [b"x" * 10_000] * 4
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("fault", ["cut short", "emptied", "changed", "longer"])
def test_a_cached_file_that_was_harmed_is_made_again(fault, split, tokenizer, cache, caplog):
    ids = np.array(encode_split(tokenizer, split))
    (stored,) = files(cache / "token_ids")
    whole = stored.read_bytes()
    harmed = {
        "cut short": whole[: len(whole) // 2],
        "emptied": b"",
        "changed": whole[:10] + b"\xff" + whole[11:],
        "longer": whole + b"\0\0",
    }[fault]
    assert harmed != whole
    stored.write_bytes(harmed)
    np.testing.assert_array_equal(encode_split(tokenizer, split), ids)
    assert "not as it was written" in caplog.text
    assert files(cache / "token_ids") == [stored] and stored.read_bytes() == whole


def test_a_harmed_tokenizer_of_the_cache_is_trained_again(split, tokenizer, cache):
    (stored,) = files(cache / "tokenizers")
    stored.write_bytes(stored.read_bytes()[:1000])
    again = make_tokenizer("sentencepiece", split, vocabulary_size=300)
    assert again.fingerprint == tokenizer.fingerprint


def test_a_harmed_corpus_of_the_cache_is_written_again(cache):
    split = load_corpus("pydoc")["valid"]
    digest = split.digest()
    split.path.write_bytes(split.path.read_bytes()[:-100])
    assert split.digest() != digest
    assert load_corpus("pydoc")["valid"].digest() == digest
