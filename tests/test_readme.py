"""The README's example runs as it stands, and its commands exist."""

import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_first_example_is_short():
    assert len([line for line in EXAMPLES[0].splitlines() if line]) <= 12


@pytest.mark.long
def test_examples_run_in_turn_and_learn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)
    first, *_, last = names["history"].history["loss"]
    # Below the entropy of guessing a byte uniformly, and falling.
    assert last < first < math.log(256)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z]+)", README, flags=re.MULTILINE))
    assert {"train", "test"} <= named <= targets
