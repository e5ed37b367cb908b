"""Where downloaded and derived files are kept, and how a file is fetched, or written whole."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def cache_root() -> Path:
    """Folder of the cache: `ELITA_TF_HOME`, else `elita_tf` in the user's cache folder.

    The user's cache folder is `XDG_CACHE_HOME`, else `~/.cache`.
    """
    home = os.environ.get("ELITA_TF_HOME")
    if home:
        return Path(home).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user_cache) / "elita_tf"


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path that becomes `path` when the block ends without an error.

    A reader sees the former file or the whole new one, also when the process is killed. The
    temporary name lies in the same folder and keeps the suffixes, which some writers look at.

    Args:
        path: the file to write; its folder is created.

    Example:

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_file(repository: str, name: str, sha256: str, instead: str, **where: Any) -> Path:
    """A pinned file of the Hugging Face hub, from the hub's own cache or downloaded.

    Args:
        repository: "owner/name".
        name: the file's path in it.
        sha256: of its content, hexadecimal.
        instead: what the user can do without it, for messages.
        **where: of `huggingface_hub.hf_hub_download`: the revision, the kind of repository.

    Raises:
        OSError: it cannot be downloaded.
        ValueError: it is not the pinned one.
    """
    import huggingface_hub

    try:
        path = Path(huggingface_hub.hf_hub_download(repository, name, **where))
    except OSError as error:
        raise OSError(
            f"{name} of {repository} could not be downloaded ({error}). Connect to the network, "
            f"or {instead}."
        ) from error
    received = file_sha256(path)
    if received != sha256:
        raise ValueError(
            f"{path} has sha256 {received}, expected {sha256}. Delete it and try again, or "
            f"{instead}."
        )
    return path
