"""Files that are written whole or not at all, and their checksums."""

import errno
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A full disk, a full quota, and a file larger than the system allows.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path | str, *, single_writer: bool = False) -> Iterator[Path]:
    """Yields a temporary path that becomes `path` when the block ends without an error.

    A reader sees the former file or the whole new one, also when the process is killed or the
    machine stops.

    Args:
        path: the file to write; its folder is created.
        single_writer: see `temporary_path`.

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
    with temporary_path(path, single_writer=single_writer) as temporary:
        yield temporary
        publish(temporary, Path(path))


@contextmanager
def temporary_path(path: Path | str, *, single_writer: bool = False) -> Iterator[Path]:
    """Yields a temporary path beside `path`; a file that is still there at the end is removed.

    The name keeps the suffixes of `path`, because some writers look at them.

    Args:
        path: the file to be written in the end; its folder is created.
        single_writer: only one thread of one process writes this file. The temporary name is then
            always the same, so that killed processes leave one such file at most. Without it the
            name is new each time, and several writers do not disturb each other.

    Raises:
        OSError: there is no room for the file, or no right to write it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = "." if single_writer else f".{uuid.uuid4().hex}."
    temporary = path.with_name(f"{prefix}{path.name}")
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


def publish(temporary: Path, path: Path) -> None:
    """Gives a finished temporary file its name, so that it survives a stop of the machine."""
    # The content must reach the disk before the name does. Otherwise a machine that stops between
    # the two would leave a file without its content.
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if os.name == "posix":  # other systems cannot open folders
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
