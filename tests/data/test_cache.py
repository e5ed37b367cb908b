import hashlib

import pytest

from elita_tf.data.cache import cache_root
from elita_tf.files import atomic_path, file_sha256


def test_cache_root_prefers_the_own_variable_then_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ELITA_TF_HOME", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("ELITA_TF_HOME")
    assert cache_root() == tmp_path / "elita_tf"


def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path):
    target = tmp_path / "a.weights.h5"
    target.write_text("former")
    with pytest.raises(RuntimeError, match="half way"), atomic_path(target) as temporary:
        temporary.write_text("new")
        assert temporary.name.endswith(".weights.h5")
        raise RuntimeError("half way")
    assert target.read_text() == "former"
    assert set(tmp_path.iterdir()) == {target}


def test_file_sha256(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 1000)
    assert file_sha256(path) == hashlib.sha256(b"abc" * 1000).hexdigest()
