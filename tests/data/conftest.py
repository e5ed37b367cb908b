import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for every test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ELITA_TF_HOME", str(folder))
    return folder
