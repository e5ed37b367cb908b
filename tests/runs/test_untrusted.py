"""A run folder from a stranger: loading it runs nothing of it, and says what is wrong with it."""

import pickle
from pathlib import Path

import pytest

from elita_tf.data import Split, make_tokenizer
from elita_tf.runs import evaluation
from elita_tf.runs.assembly import build_model, load_run
from elita_tf.runs.recipe import load_recipe
from tests.hostile import Payload

FILES = pytest.mark.parametrize(
    "name", ["recipe.toml", "tokenizer/sentencepiece.model", "last.weights.h5"]
)


@pytest.fixture(scope="module")
def made(tiny_recipe, tmp_path_factory):
    """What a run folder needs, without the training."""
    folder = tmp_path_factory.mktemp("run")
    recipe = load_recipe(str(tiny_recipe))
    text = Split(Path(recipe.corpus.removeprefix("text:")))
    tokenizer = make_tokenizer("sentencepiece", text, vocabulary_size=recipe.vocabulary_size)
    tokenizer.save(folder / "tokenizer")
    (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    build_model(recipe, tokenizer.vocabulary_size()).save_weights(folder / "last.weights.h5")
    return folder


@pytest.fixture
def run(made, tmp_path):
    for path in made.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(made)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path


def test_the_folder_loads_as_it_is(run):
    assert load_run(run).preprocessor.tokenizer.vocabulary_size() == 300


@FILES
def test_a_pickle_in_place_of_a_file_is_not_run(run, name):
    mark = run / "executed"
    content = pickle.dumps(Payload(mark), protocol=0)
    pickle.loads(content)
    assert mark.exists()  # The payload works where it is trusted.
    mark.unlink()
    (run / name).write_bytes(content)
    with pytest.raises((ValueError, OSError)):
        load_run(run)
    assert not mark.exists()


@FILES
@pytest.mark.parametrize("keep", [0.0, 0.2])
def test_a_file_that_was_cut_short(run, name, keep):
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises((ValueError, OSError)):
        load_run(run)


@FILES
def test_a_file_that_is_missing(run, name):
    (run / name).unlink()
    with pytest.raises(OSError, match=r"recipe\.toml|vocab\.json|weights\.h5"):
        load_run(run)


@pytest.mark.parametrize(
    "line", ['__class__ = "os.system"', 'architecture = "os.system"', "hidden_dim = 16"]
)
def test_a_recipe_that_does_not_fit(run, line):
    key = line.split(" =")[0]
    path = run / "recipe.toml"
    lines = [old for old in path.read_text().splitlines() if not old.startswith(f"{key} =")]
    path.write_text("\n".join([*lines, line]))
    with pytest.raises(ValueError, match="Unknown key|expected|weights.h5 does not hold"):
        load_run(run)


def test_evaluation_names_what_is_broken(run, capsys):
    (run / "last.weights.h5").write_bytes(b"none")
    with pytest.raises(SystemExit) as caught:
        evaluation.main(["--run_dir", str(run)])
    assert caught.value.code == 2
    assert "weights.h5" in capsys.readouterr().err
