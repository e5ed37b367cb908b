"""What the JSON files of a study record, as the parts that its page is made of."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
NAN = float("nan")  # what is not measured

# The usual values of the study. The part that a run belongs to follows from its other values.
GATED, SINES, TRANSFORMER = "elita_gated", "elita_query", "transformer"
ORDER = (GATED, SINES, "gla", "gla_ff2", TRANSFORMER)
TUNED, STEPS, HEADLINE_STEPS = "cosine", 450, 4_300
SIZE = {"num_layers": 3, "hidden_dim": 64}
MODEL = {"mixers": [], "mixer_options": {}, "feed_forward": "", "feed_forward_options": {}}
OPTIONS = {"warmup_steps": 30, "weight_decay": 0.0, "optimizer": "adam", "ema_momentum": 0.0}
LENGTHS, CARRIED = ("256", "1024", "4096", "16384"), "carried"
COST = ("seconds_per_step", "peak_memory_bytes")


class Records:
    """The records of a folder. The content of a file, not its name, says what it records."""

    def __init__(self, folder: Path) -> None:
        files = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
        records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        runs = [r["recipe"] | r["validation"] | r for r in records if r["kind"] == "run"]
        self.runs = sorted(runs, key=itemgetter("architecture", "learning_rate", "steps", "seed"))
        self.recall = [r for r in records if r["kind"] == "recall"]
        self.rounds = next((r["rounds"] for r in records if r["kind"] == "timing"), [])
        small = [run for run in self.runs if not changes(run, SIZE)]
        tuned = Counter(run["steps"] for run in small if run["schedule"] == TUNED)
        self.steps = min(tuned, key=lambda steps: (-tuned[steps], steps), default=STEPS)
        # In a short study the longest of the runs that equal time does not lengthen.
        fixed = (r for r in small if r["schedule"] != TUNED or r["architecture"] == TRANSFORMER)
        full = any(run["steps"] == HEADLINE_STEPS for run in small)
        self.headline = HEADLINE_STEPS if full else max((r["steps"] for r in fixed), default=None)
        # An architecture's own run: at its best rate, of the lowest validation loss with seed 0.
        self.tried = [run for run in self.part("tokens") if not run["seed"]]
        worst_first = sorted(self.tried, key=itemgetter("loss", "learning_rate"), reverse=True)
        self.own = {run["architecture"]: run for run in worst_first}

    def _part(self, run: Record) -> str:
        tuned, usual = run["schedule"] == TUNED, run["steps"] == self.steps
        if changes(run, SIZE):
            return "larger"
        if changed := changes(run):
            kind = "ablations" if changed.keys() <= MODEL.keys() else "options"
            return kind if tuned and usual else "other"
        if run["steps"] == self.headline != self.steps:
            return "headline"
        return ("tokens" if usual else "time") if tuned else "published"

    def part(self, part: str, architecture: str | None = None) -> list[Record]:
        """The runs of a part of the study, in order."""
        runs = [run for run in self.runs if architecture in (None, run["architecture"])]
        return [run for run in runs if self._part(run) == part]

    def best(self, part: str, architecture: str | None = None) -> list[Record]:
        """The runs of a part at the best rate of their architecture, or at all rates if unknown."""
        pairs = [(r, self.own.get(r["architecture"], r)) for r in self.part(part, architecture)]
        return [run for run, own in pairs if run["learning_rate"] == own["learning_rate"]]

    def groups(self, part: str) -> list[list[Record]]:
        """The `best` runs of a part, in groups of runs that differ in the seed alone."""
        return [list(x) for _, x in groupby(self.best(part), itemgetter("architecture", "steps"))]

    def minus_transformer(self, runs: list[Record]) -> float:
        """The median test loss of runs minus the Transformer's at equal tokens."""
        reference = self.best("tokens", TRANSFORMER)
        return median(map(test_figure, runs)) - median(map(test_figure, reference))

    def cost(self, architecture: str, turns: list[Record] | None = None) -> tuple[float, float]:
        """Median seconds a step and median peak memory (bytes), by default of the timing."""
        turns = turns or [x[architecture] for x in self.rounds if architecture in x]
        return tuple(median(turn[x] for turn in turns) for x in COST)


def changes(run: Record, usual: Record | None = None) -> Record:
    """What differs from the usual values, by default those of the model and of the options."""
    usual = usual or (MODEL | OPTIONS if run["schedule"] == TUNED else MODEL)
    return {key: run[key] for key, value in usual.items() if run.get(key, value) != value}


def words(values: Record, prefix: str = "") -> str:
    """Settings as `key.key = value`."""
    texts = []
    for key, value in values.items():
        nested, plain = isinstance(value, dict), f"{prefix}{key} = {json.dumps(value)}"
        texts.append(words(value, f"{prefix}{key}.") if nested else plain.replace('"', ""))
    return ", ".join(texts)


def test_figure(run: Record, figure: str = "loss", context: str = LENGTHS[0]) -> float:
    """A figure of the test split; NaN if it is not measured."""
    return run.get("test", {}).get(context, {}).get(figure, NAN)


def measured(values: Iterable[float | None]) -> list[float]:
    """The values that are numbers."""
    return [value for value in values if value is not None and not np.isnan(value)]


def median(values: Iterable[float | None]) -> float:
    """The median of those that are measured."""
    known = measured(values)
    return float(np.median(known)) if known else NAN
