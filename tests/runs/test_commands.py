"""The installed command: what it says, and what it does with output that goes wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elita_tf.runs import commands, evaluation, recipe_names, training
from elita_tf.runs.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "training").glob("*.py"))


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "elita_command", *arguments],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="0"):
        commands.main(["--help"])
    printed = capsys.readouterr().out
    for name in commands.COMMANDS:
        assert f"\n  {name} " in printed
    assert 'elita generate --preset elita_wikitext2 --prompt "The"' in printed


@pytest.mark.long
def test_tensorflow_is_quiet_unless_asked():
    quiet = run("recipes")
    assert quiet.returncode == 0 and quiet.stderr == b"" and b"quickstart" in quiet.stdout
    # What went wrong before there was a command to say it is shown.
    broken = run("recipes", KERAS_BACKEND="none")
    assert broken.returncode == 1 and b"Traceback" in broken.stderr


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_of_a_command_has_examples(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        commands.import_module(f"elita_tf.runs.{commands.COMMANDS[name][0]}").main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: elita {name}")
    assert "examples:" in printed and f"  elita {name}" in printed.split("examples:")[1]


@pytest.mark.parametrize("arguments", [[], ["trian"]])
def test_an_unknown_command(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        commands.main(arguments)
    assert "COMMAND" in capsys.readouterr().err


def test_the_scripts_are_the_commands():
    assert set(SCRIPTS) == set(commands.COMMANDS) - {"recipes"}
    for name in SCRIPTS:
        text = (ROOT / "training" / f"{name}.py").read_text()
        assert f'main(["{name}", *sys.argv[1:]])' in text
        assert len(text.splitlines()) < 12


@pytest.mark.long
@pytest.mark.parametrize("how", [["training/train.py"], ["-m", "training.train"]])
def test_the_scripts_run_from_the_root(how):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *how, "--recipe", "quickstrat"]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert child.returncode == 2
    assert "Did you mean quickstart?" in child.stderr


def test_recipes_are_listed_and_printed(capsys):
    main = commands.import_module("elita_tf.runs.recipe").main
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 5 for line in lines)
    main(["quickstart"])
    assert "corpus = " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["elita-wikitext"])
    assert "Did you mean elita-wikitext2?" in capsys.readouterr().err


@pytest.mark.long
def test_output_that_the_terminal_cannot_show_or_nobody_reads(run_dir):
    arguments = ["generate", "--run_dir", str(run_dir), "--max_length", "40", "--prompt"]
    child = run(*arguments, "3 \u03b1\u03b2", PYTHONIOENCODING="ascii")
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(rb"3 \u03b1\u03b2")
    source = f"{sys.executable} -m elita_command generate --run_dir '{run_dir}'"
    shell = f"{source} --max_length 3000 --prompt '3 plus' | head -c 3; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment)
    assert child.stdout == f"3 p{commands.BROKEN_PIPE}\n"
    assert "usage" not in child.stderr and "Traceback" not in child.stderr


@pytest.mark.long
def test_figures_that_cannot_be_written_are_shown(run_dir, monkeypatch, capsys):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(evaluation.run_folder, "write_json", refuse)
    assert evaluation.main(["--run_dir", str(run_dir), "--split", "valid"]) == 1
    out, err = capsys.readouterr()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert json.loads(out)["loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)
    assert "evaluation-valid.json could not be written" in err


def test_tensorboard_without_its_package(tiny_recipe, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    folder = tmp_path / "run"
    options = ["--recipe", str(tiny_recipe), "--run_dir", str(folder), "--tensorboard"]
    with pytest.raises(SystemExit, match="2"):
        training.main(options)
    assert "pip install 'elita_tf[tensorboard]'" in " ".join(capsys.readouterr().err.split())
    assert not folder.exists()


@pytest.mark.long
def test_tensorboard_has_the_figures_of_every_validation(tiny_recipe, tmp_path):
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    options = ["--recipe", str(tiny_recipe), "--run_dir", str(folder), "--tensorboard"]
    assert training.main(options) == 0
    files = [path.parent.name for path in folder.rglob("events.out.tfevents.*")]
    assert {"train", "validation"} <= set(files)


def test_a_run_that_finds_no_room_says_so(tiny_recipe, tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(28, "No space left on device", "loss.png")

    monkeypatch.setattr(training, "carry_out", refuse)
    assert training.main(["--recipe", str(tiny_recipe), "--run_dir", str(tmp_path / "run")]) == 1
    assert "No space left on device: 'loss.png'" in capsys.readouterr().err


@pytest.mark.long
def test_a_tilde_is_the_users_folder(run_dir, tiny_recipe, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(run_dir.parent))
    assert load_recipe(f"~/{run_dir.name}/recipe.toml") == load_recipe(str(tiny_recipe))
    assert training.main(["--recipe", str(tiny_recipe), "--run_dir", f"~/{run_dir.name}"]) == 0
    assert "is finished" in capsys.readouterr().out
    figures = evaluation.evaluate(f"~/{run_dir.name}", split="valid")
    assert figures["weights"] == "best.weights.h5"


@pytest.mark.long
def test_a_preset_of_the_package_writes_offline(tmp_path):
    arguments = ["generate", "--preset", "elita_wikitext2", "--prompt", "The", "--max_length", "9"]
    child = run(*arguments, HF_HUB_OFFLINE="1", ELITA_TF_HOME=str(tmp_path))
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(b"The")
