"""A run of one backend is evaluated, exported and loaded on the other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from elita_tf.models import ElitaBackbone, ElitaCausalLM, architectures
from elita_tf.runs import exports, generation
from elita_tf.runs.assembly import load_run
from tests import helpers
from tests.helpers import jitted

pytestmark = pytest.mark.skipif(
    helpers.BACKEND != "jax", reason="the run starts on JAX, and its child process has TensorFlow"
)
ROOT = Path(__file__).parents[2]

# What the other backend does with the run, and a model that it hands over.
OTHER = """
import sys
from pathlib import Path

import keras
import numpy as np
from elita_tf.runs import evaluation, exports
from elita_tf.runs.assembly import load_run
from tests.runs.test_backends import make_model

folder, run = Path(sys.argv[1]), sys.argv[2]
assert keras.backend.backend() == "tensorflow"
ids = {"token_ids": np.load(folder / "ids.npy")}
evaluation.main(["--run_dir", run, "--split", "valid"])
exports.main(["--run_dir", run, "--output", str(folder / "served")])
given = make_model()
given.save_weights(folder / "given.weights.h5")
np.savez(folder / "logits.npz", run=load_run(Path(run))(ids), given=given(ids))
"""


def make_model() -> ElitaCausalLM:
    """A model of every mixer, its weights drawn by NumPy."""
    arguments = {**architectures["hybrid"], "num_layers": 4, "hidden_dim": 16}
    arguments["mixers"] = ["attention2", "attention2_query", "gla", "softmax"]
    model = ElitaCausalLM(ElitaBackbone(vocabulary_size=300, **arguments))
    return helpers.randomized(model, scale=0.3)


@pytest.fixture(scope="module")
def elsewhere(run_dir, tmp_path_factory):
    """What the other backend wrote."""
    folder = tmp_path_factory.mktemp("elsewhere")
    ids = np.random.default_rng(0).integers(0, 300, (2, 9)).astype("int32")
    np.save(folder / "ids.npy", ids)
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", OTHER, str(folder), str(run_dir)]
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return folder


def test_weights_give_the_same_logits_on_both(run_dir, elsewhere):
    ids = {"token_ids": np.load(elsewhere / "ids.npy")}
    logits = np.load(elsewhere / "logits.npz")
    helpers.assert_close(helpers.leaves(jitted(load_run(run_dir))(ids)), [logits["run"]], 1e-5)
    model = make_model()
    model.set_weights([np.zeros_like(weight) for weight in model.get_weights()])
    model.load_weights(elsewhere / "given.weights.h5")
    helpers.assert_close(helpers.leaves(jitted(model)(ids)), [logits["given"]], 1e-5)


def test_a_run_is_evaluated_and_exported_elsewhere(run_dir, elsewhere, capsys):
    summary = json.loads((run_dir / "summary.json").read_text())
    evaluated = json.loads((run_dir / "evaluation-valid.json").read_text())
    assert evaluated["loss"] == pytest.approx(summary["validation_loss"], rel=1e-5)
    said = []
    for source in (["--run_dir", str(run_dir)], ["--saved_model", str(elsewhere / "served")]):
        generation.main(
            [*source, "--prompt", "3 plus", "--max_length", "12", "--sampler", "greedy"]
        )
        said.append(capsys.readouterr().out.rsplit("\n", 2)[0])
    assert said[0] == said[1] and said[0].startswith("3 plus")


def test_an_export_from_jax_says_what_to_do(run_dir, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        exports.main(["--run_dir", str(run_dir), "--output", str(tmp_path / "served")])
    assert "KERAS_BACKEND=tensorflow" in capsys.readouterr().err


def test_the_run_is_of_this_backend(run_dir):
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["backend"] == keras.backend.backend()
