"""The notebooks in `colab` are made from their scripts, and run from top to bottom."""

import ast
import importlib.util
import os
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.helpers import tensorflow_only

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("colab_build", ROOT / "colab" / "build.py")
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)

# What replaces the values of a notebook's first cell, so that it runs in seconds, without network.
SMALL = {
    "elita_tf_wikitext": {
        "RECIPE": "transformer-wikitext2-tuned",  # the quickest to trace
        "CHANGES": [
            *("corpus=pydoc", "vocabulary_size=512", "num_layers=1", "context_length=32"),
            *("batch_size=8", "steps=6", "validation_interval=3", "validation_batches=2"),
            "jit_compile=false",
        ],
        "TEXT_LENGTH": 20,
    },
    "layers_tour": {"NUM_BLOCKS": 1, "TRAINING_WINDOWS": 32, "EPOCHS": 1, "LENGTHS": (64,)},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a notebook in an empty folder, on this checkout and offline."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("ELITA_TF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(name):
        notebook = build.notebook(name)
        (parameters,) = (
            index for index, cell in enumerate(notebook.cells) if "tags" in cell.metadata
        )
        assigned = {
            target.id
            for statement in ast.parse(notebook.cells[parameters].source).body
            for target in statement.targets
        }
        assert SMALL[name].keys() <= assigned
        values = "\n".join(f"{key} = {value!r}" for key, value in SMALL[name].items())
        notebook.cells.insert(parameters + 1, nbformat.v4.new_code_cell(values))
        resources = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
        return [output for cell in notebook.cells for output in cell.get("outputs", [])]

    return run


def printed(outputs):
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def num_pictures(outputs):
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("name", build.NAMES)
def test_notebook_is_made_from_its_script(name):
    text = (ROOT / "colab" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == nbformat.writes(build.notebook(name)) + "\n", "run `make notebooks`"


def test_every_notebook_is_listed():
    assert {path.stem for path in (ROOT / "colab").glob("*.ipynb")} == set(build.NAMES)


@pytest.mark.parametrize(("owner", "shown"), [("OWNER", False), ("ada", True)])
def test_a_badge_leads_to_the_repository_or_there_is_none(owner, shown, monkeypatch):
    monkeypatch.setattr(build, "repository", lambda: f"{owner}/elita_tf")
    for name in build.NAMES:
        first = build.notebook(name).cells[0].source
        link = f"]({build.COLAB}/github/{owner}/elita_tf/blob/main/colab/{name}.ipynb)"
        assert (link in first) == ("badge" in first) == shown


@pytest.mark.parametrize("address", ["https://example.org/one/two", "https://github.com/one/two/"])
def test_addresses_that_colab_cannot_open(address, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{address}"\n')
    monkeypatch.setattr(build, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="expected https://github.com/OWNER/NAME"):
        build.repository()


@pytest.mark.long
@tensorflow_only
def test_wikitext_trains_writes_and_exports(run, tmp_path):
    outputs = run("elita_tf_wikitext")
    assert num_pictures(outputs) == 1
    assert "validation loss" in printed(outputs)
    assert (tmp_path / "run" / "saved_model" / "saved_model.pb").is_file()
    # One text of the SavedModel and, from the same prompt, one of the model.
    assert printed(outputs).count("\nThe") >= 2
    assert (tmp_path / "elita_tf_run.zip").is_file()


@pytest.mark.long
@tensorflow_only
def test_layers_tour_shows_every_layer(run):
    outputs = run("layers_tour")
    assert num_pictures(outputs) == 4
    assert "same past, same outputs: True" in printed(outputs)
    assert printed(outputs).count("from the whole") == 2
