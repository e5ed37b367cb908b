"""How Sphinx builds the documentation: `make docs`."""

import inspect
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import keras

import elita_tf

# === What Sphinx reads ===
project = "elita_tf"
author = copyright = "The elita_tf authors"
version = release = elita_tf.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["study", "recipe_keys.md"]
nitpicky = False
# In the docstrings, `x` is code.
default_role = "literal"
# Equations and commands; examples are marked as Python.
highlight_language = "none"
html_theme = "furo"
html_title = f"elita_tf {version}"
html_show_sphinx = False
templates_path: list[str] = []
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_use_rtype = False

_SECTION = re.compile(r"(Args|Call arguments|Inputs|Returns|Raises|Example|Examples|Sources?):$")
napoleon_custom_sections = [
    ("Call arguments", "params_style"),
    ("Inputs", "notes_style"),
]


def mark_equations(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Make the indented paragraphs of a docstring literal blocks, as an equation keeps its lines.

    In a docstring, what is indented under a title such as `Args:` is the content of the section.
    """
    marked: list[str] = []
    in_section = in_block = False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            in_section, in_block = bool(_SECTION.match(line.strip())), False
        if indented and not in_section and not in_block and (not marked or not marked[-1]):
            marked += ["::", ""]
            in_block = True
        marked.append(line)
    lines[:] = _without_tables(marked)


def _without_tables(lines: list[str]) -> list[str]:
    """Put Markdown tables, which Sphinx does not read in docstrings, into literal blocks."""
    result: list[str] = []
    in_table = False
    for line in lines:
        is_row = line.startswith("|")
        if is_row and not in_table:
            result += ["::", ""]
        result.append(f"    {line}" if is_row else line)
        in_table = is_row
    return result


def show_constructor(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Show the arguments of `__init__`: Keras' layers have a `__new__` that takes anything."""
    if what != "class" or not issubclass(obj, keras.layers.Layer):
        return None
    parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
    shown = [each.replace(annotation=inspect.Parameter.empty) for each in parameters]
    return str(inspect.Signature(shown)), ""


# === The keys of a recipe ===
def write_recipe_keys(app: Any) -> None:
    """Write `recipe_keys.md`, the tables that the page on recipes includes, from `Recipe`."""
    from elita_tf.runs.recipe import Recipe, describe

    annotations = inspect.get_annotations(Recipe, eval_str=True)
    by_name = {each.name: each for each in fields(Recipe)}
    text = []
    for title, comments in groups(Recipe):
        text += ["", f"## {title}", "", "| key | expected | default | |", "|---|---|---|---|"]
        for name, comment in comments.items():
            default = by_name[name].default
            if default is MISSING and by_name[name].default_factory is not MISSING:
                default = by_name[name].default_factory()
            shown = "" if default is MISSING else f"`{json.dumps(default)}`"
            expected = describe(annotations[name]).replace("|", "\\|")
            text.append(f"| `{name}` | {expected} | {shown} | {comment} |")
    _write(Path(app.srcdir) / "recipe_keys.md", "\n".join(text) + "\n")


def groups(cls: type) -> list[tuple[str, dict[str, str]]]:
    """The titles in a class, each with the comment above every field that follows it."""
    found: list[tuple[str, dict[str, str]]] = []
    comment = ""
    for line in map(str.strip, inspect.getsource(cls).splitlines()):
        if title := re.fullmatch(r"# === (.*) ===", line):
            found.append((title[1], {}))
        elif line.startswith("# "):
            comment = line[2:]
        elif found and (field := re.match(r"(\w+): ", line)):
            found[-1][1][field[1]] = comment
            comment = ""
    return found


def _write(path: Path, text: str) -> None:
    # A file that did not change is not written, as Sphinx would read its page anew.
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def setup(app: Any) -> None:
    """Tell Sphinx of the functions above."""
    app.connect("builder-inited", write_recipe_keys)
    # Before napoleon, which reads the sections.
    app.connect("autodoc-process-docstring", mark_equations, priority=400)
    app.connect("autodoc-process-signature", show_constructor)
