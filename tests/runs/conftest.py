import pytest

from elita_tf.runs import training
from tests import helpers

TINY = """
corpus = "{corpus}"
tokenizer = "sentencepiece"
vocabulary_size = 300
architecture = "elita_query"
num_layers = 1
hidden_dim = 8
num_heads = 2
context_length = 16
batch_size = 4
steps = 5
validation_interval = 2
validation_batches = 2
schedule = "capped_inverse_sqrt"
jit_compile = {jit_compile}
learning_rate = 1e-2
"""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """One cache for all the tests here, apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELITA_TF_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory):
    """A recipe file for a model and a text that train in a second."""
    folder = tmp_path_factory.mktemp("tiny")
    text = folder / "text.txt"
    text.write_text("".join(f"{i} plus {j} is {i + j}.\n" for i in range(30) for j in range(30)))
    recipe = folder / "tiny.toml"
    recipe.write_text(TINY.format(corpus=f"text:{text}", jit_compile=str(helpers.QUICKEST).lower()))
    return recipe


@pytest.fixture(scope="session")
def run_dir(tiny_recipe, tmp_path_factory):
    """The folder of a finished run."""

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert training.main(["--recipe", str(tiny_recipe), "--run_dir", str(folder)]) == 0
    return folder
