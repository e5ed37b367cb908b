import csv
import json
import re
import shutil

import keras
import numpy as np
import pytest

from elita_tf.callbacks import newest_checkpoint
from elita_tf.data import load_tokenizer
from elita_tf.runs import assembly, evaluation, run_folder
from elita_tf.runs import training as script
from elita_tf.runs.assembly import assemble, build_model
from elita_tf.runs.recipe import load_recipe


def test_the_run_folder_is_complete(run_dir):
    assert {path.name for path in run_dir.iterdir()} == {
        "best.weights.h5",
        "checkpoints",
        "last.weights.h5",
        "loss.png",
        "manifest.json",
        "metrics.csv",
        "preset",
        "recipe.toml",
        "sample.txt",
        "summary.json",
        "tokenizer",
        "versions.json",
    }
    assert load_tokenizer(run_dir / "tokenizer").vocabulary_size() == 300
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
        assert 0 < float(row["gradient_norm"]) < 100


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


@pytest.mark.long
def test_the_seed_decides_the_run(run_dir, tiny_recipe, tmp_path):
    arguments = ["--recipe", str(tiny_recipe), "--run_dir"]
    script.main([*arguments, str(tmp_path / "same"), "--set", "seed=0"])
    script.main([*arguments, str(tmp_path / "other"), "--set", "seed=1", "steps=5"])
    for first, second in zip(weights(run_dir), weights(tmp_path / "same"), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)
    assert not np.allclose(weights(run_dir)[0], weights(tmp_path / "other")[0], atol=1e-3)


def test_a_run_removes_what_a_former_one_left_and_nothing_else(run_dir, tiny_recipe, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    evaluation.main(["--run_dir", str(folder)])
    mine = [folder / "notes.txt", folder / "preset/mine.txt", folder / "checkpoints/epoch1.pt"]
    for path in mine:
        path.write_text("mine")
    files = {path for path in folder.rglob("*") if path.is_file()}
    run_folder.prepare(folder, load_recipe(str(tiny_recipe)), load_tokenizer(run_dir / "tokenizer"))
    left = {path for path in folder.rglob("*") if path.is_file()}
    names = ("recipe.toml", "tokenizer/sentencepiece.model", "versions.json", "manifest.json")
    assert left == {*mine, *(folder / name for name in names)} < files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nothing"], "one of elita-"),
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


def test_a_run_that_diverges_stops_and_says_so(tiny_recipe, tmp_path, capsys):
    # The first update is finite and puts every weight out of range.
    overrides = ["learning_rate=9e18", "inverse_sqrt_scale=9e18", "checkpoint_seconds=0"]
    run = ["--recipe", str(tiny_recipe), "--run_dir", str(tmp_path)]
    assert script.main([*run, "--set", *overrides]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] is False
    assert summary["steps"] == 2
    good = newest_checkpoint(tmp_path / "checkpoints")
    assert good.step == 1
    printed = capsys.readouterr().out
    assert f"--force goes on from the last checkpoint, {good.path}, with --set on" in printed
    (found,) = re.findall("Step 2: loss .* norm of the gradient .*windows (.*) of 17 ids", printed)
    parts = assemble(load_recipe(str(tiny_recipe)), None)
    inputs, _ = list(parts.training.take(2))[1]
    for index, window in zip(found.split(", "), np.array(inputs["token_ids"]), strict=True):
        np.testing.assert_array_equal(parts.train_ids[int(index) * 17 :][:16], window)


def overwrite(monkeypatch, module, function):
    def called(*args, **kwargs):
        raise AssertionError(f"{function} was called")

    monkeypatch.setattr(module, function, called)


def test_a_finished_run_says_so(run_dir, tiny_recipe, capsys, monkeypatch):
    overwrite(monkeypatch, script, "carry_out")
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    assert script.main(["--recipe", str(tiny_recipe), "--run_dir", str(run_dir)]) == 0
    assert script.main(["--resume", "--run_dir", str(run_dir)]) == 0
    assert capsys.readouterr().out.count("is finished. Train it anew with --restart") == 2
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "steps=7", "beta_2=0.9"], r"\(steps: 5 -> 7; beta_2: 0.999 -> 0.9\)"),
        (["--resume", "--set", "seed=3"], r"another recipe \(seed: 0 -> 3\)"),
        (["--force", "--set", "steps=4"], "has done 5 steps, more than steps = 4"),
        (["--resume", "--restart"], "--restart: not allowed with argument --resume"),
    ],
)
def test_a_changed_recipe_is_refused(run_dir, tiny_recipe, capsys, arguments, message):
    source = [] if "--resume" in arguments else ["--recipe", str(tiny_recipe)]
    with pytest.raises(SystemExit, match="2"):
        script.main([*source, "--run_dir", str(run_dir), *arguments])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize("change", ["hidden_dim=16", "optimizer=muon", "feed_forward=swiglu"])
def test_force_with_another_model_changes_nothing(run_dir, capsys, change):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    arguments = ["--resume", "--force", "--run_dir", str(run_dir), "--set", "steps=6", change]
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert "belongs to another model, optimizer" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


@pytest.mark.long
def test_a_changed_recipe_and_text_go_on_by_force(run_dir, tmp_path, capsys):
    folder, text = tmp_path / "run", tmp_path / "other.txt"
    shutil.copytree(run_dir, folder)
    text.write_text("".join(f"{i} minus {j} is {i - j}.\n" for i in range(30) for j in range(30)))
    recipe = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(re.sub("corpus = .*", f'corpus = "text:{text}"', recipe))
    arguments = ["--resume", "--run_dir", str(folder), "--set", "steps=6"]
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert re.search("corpus: .* -> .*steps: 5 -> 6", capsys.readouterr().err)
    assert script.main([*arguments, "--force"]) == 0
    assert "Going on after step 5 of 6" in capsys.readouterr().out
    with (folder / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [2, 4, 6]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6


def test_a_changed_text_under_the_same_name_is_refused(run_dir):
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    ids = np.arange(9, dtype="uint16")
    with pytest.raises(ValueError, match="not those that .* was trained on"):
        run_folder.require_same_text(checkpoint, ids)
    notes = run_folder.checkpoint_metadata(load_recipe(str(run_dir / "recipe.toml")), ids)
    run_folder.require_same_text(checkpoint._replace(metadata=notes), ids)


@pytest.mark.long
def test_averaged_weights_are_validated_kept_and_gone_on_with_bit_for_bit(
    tiny_recipe, tmp_path, monkeypatch
):
    built = []
    build = assembly.ElitaBackbone
    monkeypatch.setattr(
        assembly, "ElitaBackbone", lambda **options: built.append(1) or build(**options)
    )

    def run(folder, steps, *options):
        overrides = ["--set", "ema_momentum=0.6", f"steps={steps}", *options]
        arguments = ["--recipe", str(tiny_recipe), "--run_dir", str(folder)]
        assert script.main([*arguments, *overrides]) == 0
        with (folder / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        return [(row["step"], row["loss"], row["val_loss"]) for row in rows]

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    rows = run(whole, 5)
    assert len(built) == 1  # for training, the final figures, the preset and the sample
    run(resumed, 3)
    assert run(resumed, 5, "--force") == rows
    checkpoints = [newest_checkpoint(folder / "checkpoints") for folder in (whole, resumed)]
    for name, array in checkpoints[0].arrays.items():
        np.testing.assert_array_equal(checkpoints[1].arrays[name], array)
    for name in ("best.weights.h5", "last.weights.h5"):
        for first, second in zip(weights(whole, name), weights(resumed, name), strict=True):
            np.testing.assert_array_equal(first, second)
    # Training goes on from the weights, and not from their averages, which are the last ones.
    arrays = checkpoints[0].arrays
    raw = next(array for name, array in arrays.items() if name.startswith("model/"))
    last = weights(whole)[0]
    assert raw.shape == last.shape and not np.allclose(raw, last, rtol=1e-4)
    summary = json.loads((whole / "summary.json").read_text())
    model = assembly.load_trained(whole, load_recipe(str(whole / "recipe.toml")), 300)
    setup = assemble(load_recipe(str(whole / "recipe.toml")), None)
    losses, counts = evaluation.losses_by_position(model, setup.valid_ids, 16, 4)
    assert losses.sum() / counts.sum() == summary["validation_loss"]
