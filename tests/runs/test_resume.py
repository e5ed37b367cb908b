"""Runs killed in child processes end as if nothing had happened.

The long form: python -m pytest --soak -s tests/runs/test_resume.py
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from elita_tf.callbacks import newest_checkpoint
from elita_tf.callbacks.checkpoint_files import UNFINISHED
from elita_tf.runs import training as script

ROOT = Path(__file__).parents[2]
# No child may finish its run before it is killed.
STEPS_PER_KILL = 25
MILLISECONDS = 600_000  # of a machine that may be busy

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


def arguments(recipe, folder, steps, *overrides):
    settings = [f"steps={steps}", "validation_interval=17", "dropout=0.1", "carry_state=true"]
    return ["--recipe", str(recipe), "--run_dir", str(folder), "--set", *settings, *overrides]


def wait_until(condition, process):
    for _ in range(MILLISECONDS):
        if condition():
            return
        assert process.poll() is None, f"the run ended by itself with {process.returncode}"
        time.sleep(0.001)
    pytest.fail(f"nothing happened in {MILLISECONDS} ms")


def kill(command, folder, number, delay):
    """Runs until it has gone on, then sends a signal; whether that left a half-written file.

    And whether the run itself ended what it was doing: in a validation, before which everything
    is saved, a signal ends the process at once. A delay is in seconds; None waits for a checkpoint
    that is being written.
    """
    names = set(folder.glob("step-*.npz"))
    process = subprocess.Popen(
        [sys.executable, "training/train.py", *command], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: set(folder.glob("step-*.npz")) - names, process)
        if delay is None:
            wait_until((folder / UNFINISHED).exists, process)
        else:
            time.sleep(delay)
        process.send_signal(number)
        code = process.wait(timeout=1200)
    finally:
        process.kill()
        process.wait()
    handled = code == 128 + number
    assert handled or code == -number
    return (folder / UNFINISHED).exists(), handled


def assert_same_run(first, second):
    expected, received = (newest_checkpoint(folder / "checkpoints") for folder in (first, second))
    assert received.step == expected.step
    assert received.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(received.arrays[name], array)
    rows = []
    for folder in (first, second):
        with (folder / "metrics.csv").open() as file:
            rows.append(list(csv.DictReader(file)))
    for ours, theirs in zip(*rows, strict=True):
        for row in (ours, theirs):
            assert float(row.pop("tokens_per_second")) > 0  # a time: no two runs share it
        assert ours == theirs
    losses = [
        json.loads((f / "summary.json").read_text())["validation_loss"] for f in (first, second)
    ]
    assert losses[0] == losses[1]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kills", "numbers"),
    [
        (3, [signal.SIGTERM, signal.SIGINT]),
        pytest.param(32, [signal.SIGTERM, signal.SIGINT], marks=pytest.mark.soak),
    ],
    ids=["short", "long"],
)
def test_a_run_killed_again_and_again_ends_the_same(
    tiny_recipe, tmp_path, monkeypatch, kills, numbers
):
    monkeypatch.setattr(script, "keep_for_use", lambda *_: None)  # takes as long again
    steps, generator = STEPS_PER_KILL * kills, random.Random(kills)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    often = "checkpoint_seconds=0"
    half_written = 0
    for i in range(kills):
        number = numbers[i] if i < len(numbers) else signal.SIGKILL
        # Every second SIGKILL comes in the midst of a write, the others at any moment.
        delay = None if i % 2 == 0 and number == signal.SIGKILL else generator.uniform(0, 0.5)
        command = arguments(tiny_recipe, killed, steps, often)
        half, handled = kill(command, killed / "checkpoints", number, delay)
        half_written += half
        if handled:
            summary = json.loads((killed / "summary.json").read_text())
            assert (summary["finished"], summary["stopped_by"]) == (False, number.name)
            assert newest_checkpoint(killed / "checkpoints").step == summary["steps"]
    print(f"{kills} kills survived, {half_written} of them in the midst of a write.")
    assert half_written or kills < 10
    assert script.main(arguments(tiny_recipe, killed, steps, often)) == 0
    assert script.main(arguments(tiny_recipe, whole, steps)) == 0
    assert_same_run(whole, killed)
