"""The documentation has a page for every public module, and its examples run as they stand."""

import inspect
import re
import runpy
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

import elita_tf
from elita_tf.runs.recipe import Recipe

DOCS = Path(__file__).parent.parent / "docs"
# tests/experimental runs the one that needs JAX and eight devices.
PAGES = sorted(
    path
    for path in DOCS.rglob("*.md")
    if "```python" in path.read_text(encoding="utf-8") and path.name != "sequence_parallel.md"
)


@pytest.mark.parametrize("name", elita_tf.__all__)
def test_every_public_name_is_on_a_page(name: str) -> None:
    page = (DOCS / "api" / f"{name}.md").read_text(encoding="utf-8")
    assert f".. automodule:: elita_tf.{name}\n   :members:" in page
    assert re.search(rf"^{name}$", (DOCS / "api" / "index.md").read_text(), flags=re.MULTILINE)
    module = import_module(f"elita_tf.{name}")
    # What a module of one file defines, it exports.
    own = [k for k, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__]
    public = getattr(module, "__all__", [each for each in own if not each.startswith("_")])
    described = (each for each in public if callable(getattr(module, each)))
    assert public and all(inspect.getdoc(getattr(module, each)) for each in described)


def test_every_key_of_a_recipe_is_described() -> None:
    groups = runpy.run_path(str(DOCS / "conf.py"))["groups"](Recipe)
    described = {name: comment for _, comments in groups for name, comment in comments.items()}
    assert list(described) == [each.name for each in fields(Recipe)]
    assert all(described.values()) and [title for title, _ in groups][:2] == ["Text", "Model"]


@pytest.mark.long
@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_examples_of_a_page_run_in_turn(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    text = path.read_text(encoding="utf-8")
    for example in re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        exec(compile(example, path.name, "exec"), names)
