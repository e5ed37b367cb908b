import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import run_folder
import train as script
from assembly import build_model
from recipe import load_recipe

from elita_tf.data import load_tokenizer

ROOT = Path(__file__).parents[2]


def test_the_run_folder_is_complete(run_dir):
    assert {path.name for path in run_dir.iterdir()} == {
        "best.weights.h5",
        "last.weights.h5",
        "loss.png",
        "metrics.csv",
        "preset",
        "recipe.toml",
        "sample.txt",
        "summary.json",
        "tokenizer",
        "versions.json",
    }
    assert load_tokenizer(run_dir / "tokenizer").vocabulary_size == 300
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["keras"] == keras.__version__


def test_metrics_are_taken_every_interval_and_the_run_ends_at_its_steps(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4, 5]
    assert float(rows[-1]["learning_rate"]) == pytest.approx(1e-2 / np.sqrt(6))
    for row in rows:
        assert 0 < float(row["val_loss"]) < 10
        assert float(row["tokens_per_second"]) > 0


def test_the_summary(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["finished"] is True
    assert summary["steps"] == 5
    assert summary["validation_perplexity"] == pytest.approx(np.exp(summary["validation_loss"]))
    assert 1 < summary["validation_unigram_entropy"] < np.log(300)
    assert 1 < summary["train_unigram_entropy"] < np.log(300)
    recipe = load_recipe(str(run_dir / "recipe.toml"))
    assert summary["parameters"] == build_model(recipe, 300).count_params()
    assert all(
        summary[key] > 0 for key in ("tokens_per_second", "peak_memory_bytes", "wall_time_seconds")
    )


def weights(folder, name="last.weights.h5"):
    model = build_model(load_recipe(str(folder / "recipe.toml")), 300)
    model.load_weights(folder / name)
    return model.get_weights()


def test_the_seed_decides_the_run(run_dir, tiny_recipe, tmp_path):
    arguments = ["--recipe", str(tiny_recipe), "--run_dir"]
    script.main([*arguments, str(tmp_path / "same"), "--set", "seed=0"])
    script.main([*arguments, str(tmp_path / "other"), "--set", "seed=1", "steps=5"])
    for first, second in zip(weights(run_dir), weights(tmp_path / "same"), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)
    assert not np.allclose(weights(run_dir)[0], weights(tmp_path / "other")[0], atol=1e-3)


def test_a_run_removes_what_a_former_one_left_and_nothing_else(run_dir, tiny_recipe, tmp_path):
    for name in ("evaluation-test.json", "best.weights.h5", "summary.json"):
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").write_text("mine")
    run_folder.prepare(
        tmp_path, load_recipe(str(tiny_recipe)), load_tokenizer(run_dir / "tokenizer")
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"notes.txt", "recipe.toml", "tokenizer", "versions.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nothing"], "one of elita-wikitext2"),
        (["--set", "stepz=1"], "Unknown key stepz"),
        (["--set", "batch_size=100000"], "fewer than batch_size=100000"),
        (["--set", "corpus=text:/nowhere"], "/nowhere"),
        (["--set", "corpus=wikitext-2", "--data_dir", "/nowhere"], "lacks wiki.train.raw"),
    ],
)
def test_a_mistake_stops_before_the_run_folder(tiny_recipe, tmp_path, capsys, arguments, message):
    folder = tmp_path / "run"
    with pytest.raises(SystemExit, match="2"):
        script.main(["--recipe", str(tiny_recipe), "--run_dir", str(folder), *arguments])
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_a_run_that_diverges_stops_and_says_so(tiny_recipe, tmp_path):
    # The first update is finite and puts every weight out of range.
    overrides = ["--set", "learning_rate=1e30", "inverse_sqrt_scale=1e30", "steps=50"]
    code = script.main(["--recipe", str(tiny_recipe), "--run_dir", str(tmp_path), *overrides])
    assert code == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] is False
    assert summary["steps"] < 50


@pytest.fixture
def endless_run(tiny_recipe, tmp_path):
    """A run as its own process, once it has validated."""
    command = [sys.executable, "training/train.py", "--recipe", str(tiny_recipe)]
    options = ["--run_dir", str(tmp_path / "run"), "--set", "steps=1000000"]
    process = subprocess.Popen(
        command + options, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "loss.png").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield process, tmp_path / "run"
    process.kill()
    process.wait()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupted_run_can_be_used(endless_run, name):
    process, folder = endless_run
    process.send_signal(getattr(signal, name))
    code = process.wait(timeout=60)
    assert np.isfinite(weights(folder, "last.weights.h5")[0]).all()
    assert np.isfinite(weights(folder, "best.weights.h5")[0]).all()
    assert (folder / "metrics.csv").read_text().count("\n") >= 2
    if name == "SIGKILL":
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + getattr(signal, name)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["finished"] is False
        assert summary["stopped_by"] == name
        assert summary["steps"] >= 2
