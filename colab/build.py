"""Makes the notebooks of this folder: python colab/build.py (or `make notebooks`).

A notebook is made from the file of the same name, a plain Python script in jupytext's percent
format. The address of the repository stands in one place, `project.urls` of pyproject.toml; it is
written into the notebooks, and into the badges of README.md.
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
    """The notebook of `NAME.py`, with its badge and the repository's address, without outputs."""
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    made = jupytext.reads(source.replace("{{repository}}", repository()), fmt="py:percent")
    link = f"{COLAB}/github/{repository()}/blob/main/colab/{name}.ipynb"
    badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({link})"
    made.cells.insert(0, nbformat.v4.new_markdown_cell(badge))
    # Ids are random otherwise, and the file another one every time.
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
    made.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    return made


def readme() -> str:
    """README.md with the repository's address in its badges."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(rf"(?<={re.escape(COLAB)}/github/)[\w.-]+/[\w.-]+(?=/blob/)", repository(), text)


def main() -> None:
    """Writes everything that holds the address."""
    for name in NAMES:
        nbformat.write(notebook(name), FOLDER / f"{name}.ipynb")
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")


if __name__ == "__main__":
    main()
