"""Where downloaded and derived files are kept, and how a file is fetched, or written whole."""

import errno
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# A full disk, a full quota, and a file larger than the system allows.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Hexadecimal digits of a sum in a file's name: 64 bits, against faults, not against forgery.
_DIGITS = 16


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

    A reader sees the former file or the whole new one, also when the process is killed, the
    machine stops, or several threads or processes write at once. The temporary name lies in the
    same folder and keeps the suffixes, which some writers look at.

    Args:
        path: the file to write; its folder is created.

    Raises:
        OSError: there is no room for the file, or no right to write it.

    Example:

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_path(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    path = Path(path)
    with _temporary(path) as temporary:
        yield temporary
        _settle(temporary, path)


def kept_file(path: Path, write: Callable[[Path], None]) -> Path:
    """The file of the cache that `write` makes: made once, and checked whenever it is asked for.

    The sum of its content is part of its name, so one that was cut short or changed is found out
    and made again.

    Args:
        path: the file's name without the sum.
        write: writes the content to the path that it is given.

    Returns:
        The path with the sum.

    Raises:
        OSError: as `atomic_path`.
    """
    for kept in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}")):
        if kept == _with_sum(path, kept):
            return kept
        logger.warning("%s is not as it was written and is made again", kept)
    with _temporary(path) as temporary:
        write(temporary)
        kept = _with_sum(path, temporary)
        _settle(temporary, kept)
    return kept


def _with_sum(path: Path, content: Path) -> Path:
    return path.with_name(f"{path.stem}-{file_sha256(content)[:_DIGITS]}{path.suffix}")


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name of nobody else's in the folder of `path`; what has it in the end is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        yield temporary
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise OSError(
            error.errno,
            f"There is no room for {path} ({error.strerror}). Make some, or choose another folder; "
            "that of the cache is ELITA_TF_HOME",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _settle(temporary: Path, path: Path) -> None:
    # The content reaches the disk before the name does, or a machine that stops between the two
    # would leave a file without its content.
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hub_file(repository: str, name: str, sha256: str, instead: str, **where: Any) -> Path:
    """A pinned file of the Hugging Face hub, from the hub's own cache or downloaded.

    One in the hub's cache that is not the pinned one is downloaded again, once.

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
    path = _download(repository, name, instead, where)
    if file_sha256(path) != sha256:
        logger.warning("%s is not the pinned file and is downloaded again", path)
        path = _download(repository, name, instead, {**where, "force_download": True})
    received = file_sha256(path)
    if received != sha256:
        raise ValueError(
            f"{name} of {repository} has sha256 {received}, expected {sha256}: what the hub, or "
            f"something on the way, sends is not the pinned file. Try again later, or {instead}."
        )
    return path


def _download(repository: str, name: str, instead: str, where: dict[str, Any]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, **where))
    # The hub's client lets through errors of its transport, whose classes change with versions.
    except Exception as error:
        raise OSError(
            f"{name} of {repository} could not be downloaded ({error}). Connect to the network, "
            f"or {instead}."
        ) from error
