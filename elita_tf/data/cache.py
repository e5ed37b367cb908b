"""The folder of downloaded and derived files, and how a file gets into it."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elita_tf.files import file_sha256, publish, temporary_path

logger = logging.getLogger(__name__)

# Hexadecimal digits of a checksum in a file's name: 64 bits find faults, but not forgeries.
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


def cached_file(path: Path, write: Callable[[Path], None]) -> Path:
    """The file of the cache that `write` makes: written once, and checked at every call.

    A part of the content's SHA-256 belongs to the name, so that a file that was cut short or
    changed is noticed and written again.

    Args:
        path: the file's name without the checksum.
        write: writes the content to the path that it is given.

    Returns:
        The path with the checksum.

    Raises:
        OSError: there is no room for the file, or no right to write it.
    """
    for stored in sorted(path.parent.glob(f"{path.stem}-*{path.suffix}")):
        if stored == _with_checksum(path, stored):
            return stored
        logger.warning("%s is not as it was written and is made again", stored)
    with temporary_path(path) as temporary:
        write(temporary)
        stored = _with_checksum(path, temporary)
        publish(temporary, stored)
    return stored


def _with_checksum(path: Path, content: Path) -> Path:
    return path.with_name(f"{path.stem}-{file_sha256(content)[:_DIGITS]}{path.suffix}")


def hub_file(repository: str, name: str, sha256: str, instead: str, **where: Any) -> Path:
    """A pinned file of the Hugging Face hub, from the hub's own cache or downloaded.

    A file in the hub's cache whose content is not the pinned one is downloaded again, once.

    Args:
        repository: "owner/name".
        name: the file's path in it.
        sha256: the hexadecimal checksum of its content.
        instead: for error messages: what the user can do without the file.
        **where: arguments of `huggingface_hub.hf_hub_download`, as the revision.

    Raises:
        OSError: the file cannot be downloaded.
        ValueError: the content is not the pinned one.
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
    # The hub's client passes on errors of its network library, whose classes change with versions.
    except Exception as error:
        raise OSError(
            f"{name} of {repository} could not be downloaded ({error}). Connect to the network, "
            f"or {instead}."
        ) from error
