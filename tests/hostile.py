"""What a stranger's file could hold; each writes a mark if it is trusted."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Payload:
    """Writes the mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def hostile_objects(mark: Path) -> list[dict[str, Any]]:
    """What Keras' format could name instead of an activation, an initializer or a layer."""
    command = f"touch {mark}"
    names = [
        ("os", "system"),
        ("builtins", "eval"),
        ("subprocess", "run"),
        ("keras.utils", "get_file"),
    ]
    found = []
    for module, name in names:
        found.append({"module": module, "class_name": name, "config": {"command": command}})
        found.append({"module": module, "class_name": "function", "config": name})
        found[-1]["registered_name"] = name
    marshalled = {"value": ["4wAAAAA=", None, None]}
    found.append({"class_name": "__lambda__", "config": marshalled, "module": "builtins"})
    return found


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """The archive with its entries changed, under the same name."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path
