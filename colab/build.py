"""Makes the notebooks of this folder: python colab/build.py (or `make notebooks`).

A notebook is made from the file of the same name, a plain Python script in jupytext's percent
format. The address of the repository stands in one place, `project.urls` of pyproject.toml, and is
written into the notebooks. While it names no owner, they have no badge, which would lead nowhere.
"""

import re
import tomllib
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
NAMES = ("elita_tf_wikitext", "layers_tour")
HOST = "https://github.com/"
COLAB = "https://colab.research.google.com"
NO_OWNER = "OWNER"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def repository() -> str:
    """Owner and name of the repository, of the address in pyproject.toml.

    Raises:
        ValueError: an address that Colab cannot open notebooks from.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"]["Repository"]
    if not re.fullmatch(re.escape(HOST) + r"[\w.-]+/[\w.-]+", address):
        raise ValueError(
            f"Repository = {address!r} in pyproject.toml: expected {HOST}OWNER/NAME, without a "
            "slash at the end."
        )
    return address.removeprefix(HOST)


def notebook(name: str) -> nbformat.NotebookNode:
    """The notebook of `NAME.py`, with the repository's address and a badge, without outputs."""
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    made = jupytext.reads(source.replace("{{repository}}", repository()), fmt="py:percent")
    if not repository().startswith(f"{NO_OWNER}/"):
        link = f"{COLAB}/github/{repository()}/blob/main/colab/{name}.ipynb"
        badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"
        made.cells.insert(0, nbformat.v4.new_markdown_cell(badge))
    # Ids are random otherwise, and the file another one every time.
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
    made.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    return made


def main() -> None:
    """Writes the notebooks."""
    for name in NAMES:
        nbformat.write(notebook(name), FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
