"""The study of the README, `elita study --data_dir DIR`. The same again goes on with it.

Every run is trained by `elita train` in a process of its own and leaves one JSON file, from which
`results.py` makes the page. What is done is not done again, so that the study can be stopped at any
time. A part chooses by validation losses; test losses are what it reports.
"""

import dataclasses
import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from elita_tf.data import encode_split, load_corpus, load_tokenizer
from elita_tf.runs import recall, results, run_folder
from elita_tf.runs.assembly import load_trained
from elita_tf.runs.command_line import command_parser, explained, path
from elita_tf.runs.evaluation import label_losses, report
from elita_tf.runs.recipe import Recipe, checked_recipe, load_recipe

# Labels from here on have seen something in every window that is compared.
LATE = 128
CARRIED = "carried"


# What is tried at the best rate of each, and kept if the mean of those that tried it improves.
OPTIONS = {
    "no warm-up": ("warmup_steps=0",),
    "a warm-up of 100 steps": ("warmup_steps=100",),
    "weight decay 0.1": ("weight_decay=0.1",),
    "Muon": ("optimizer=muon",),
    "averaged weights": ("ema_momentum=0.99",),
}
_GATED, _GLA = "mixer_options.attention2_gated.", "mixer_options.gla."
ABLATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no gate, sines": ("elita_query", ()),
    "learned decay": ("elita_gated", (f"{_GATED}decay=learned",)),
    "with sines": ("elita_gated", (f"{_GATED}context_length=256",)),
    "no query term": ("elita_gated", (f"{_GATED}use_query=false",)),
    "SwiGLU": ("elita_gated", ("feed_forward=swiglu",)),
    "half-lives 1 to 16": ("elita_gated", (f"{_GATED}half_lives=[1, 16]",)),
    "half-lives 1 to 256": ("elita_gated", (f"{_GATED}half_lives=[1, 256]",)),
    "half-lives 4 to 64": ("elita_gated", (f"{_GATED}half_lives=[4, 64]",)),
    "one GLA block": ("elita_gated", ('mixers=["attention2_gated", "gla", "attention2_gated"]',)),
    "one softmax block": (
        "elita_gated",
        ('mixers=["attention2_gated", "attention2_gated", "softmax"]',),
    ),
    "GLA and FeedForward2, half-life 16": ("gla_ff2", (f"{_GLA}half_lives=none",)),
    "GLA without gate": ("gla", (f"{_GLA}gate=none",)),
    "GLA, fixed decay": ("gla", (f"{_GLA}gate=fixed",)),
    "GLA, scalar gate": ("gla", (f"{_GLA}gate=scalar",)),
}
LARGER = ("num_layers=6", "hidden_dim=256")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much of everything the study does."""

    folder: Path  # of the JSON files
    page: Path
    architectures: tuple[str, ...] = ("elita_gated", "elita_query", "gla", "gla_ff2", "transformer")
    rates: tuple[float, ...] = (3e-3, 6e-3, 12e-3, 24e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 450
    validation_interval: int = 50
    lengths: tuple[int, ...] = (256, 1_024, 4_096, 16_384)
    headline_steps: int = 4_300
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    options: tuple[str, ...] = tuple(OPTIONS)
    options_tried_on: tuple[str, ...] = ("elita_gated", "gla_ff2", "transformer")
    larger_steps: int = 225
    timed_steps: int = 31
    timing_rounds: int = 3
    recall_plan: recall.Plan = recall.FULL


FULL = Plan(Path("docs", "study"), Path("docs", "results.md"))
SHORT = Plan(
    Path("runs", "study-short"),
    Path("runs", "study-short", "results.md"),
    architectures=("elita_gated", "elita_query", "gla_ff2", "transformer"),
    rates=(12e-3,),
    seeds=(0,),
    steps=100,
    lengths=(256, 1_024),
    headline_steps=120,
    ablations=("no gate, sines", "learned decay", "SwiGLU", "one GLA block"),
    options=("Muon", "averaged weights"),
    options_tried_on=("elita_gated",),
    larger_steps=4,
    timed_steps=6,
    timing_rounds=1,
    recall_plan=recall.SHORT,
)


class Run(NamedTuple):
    """A training run, of a recipe with overrides; its name says both."""

    recipe: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return re.sub(r"[^\w.=,-]", "", ",".join([self.recipe, *self.overrides]))

    def resolved(self) -> Recipe:
        return load_recipe(self.recipe, self.overrides)


class Study:
    """The parts of a plan, on a data folder; what is done is in the plan's folder."""

    def __init__(self, plan: Plan, data_dir: Path, runs: Path) -> None:
        self.plan, self.data_dir, self.runs = plan, data_dir, runs
        self.plan.folder.mkdir(parents=True, exist_ok=True)

    # === What is recorded ===
    def record(self, name: str) -> dict[str, Any]:
        """What the JSON file of this name holds; nothing while there is none."""
        path = self.plan.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Writes the file, and the page anew."""
        run_folder.write_json(self.plan.folder / f"{name}.json", record)
        results.write_page(self.plan.folder, self.plan.page)

    # === Runs ===
    def tuned(self, architecture: str, rate: float, *overrides: str) -> Run:
        """A run of the tuned recipe of an architecture."""
        recipe = f"{architecture.replace('_', '-')}-wikitext2-tuned"
        return self._run(recipe, f"learning_rate={rate:g}", *overrides)

    def _run(self, recipe: str, *overrides: str) -> Run:
        keys = {override.split("=")[0] for override in overrides}
        defaults = {"steps": self.plan.steps, "validation_interval": self.plan.validation_interval}
        own = [f"{key}={value}" for key, value in defaults.items() if key not in keys]
        return Run(recipe, (*overrides, *own))

    def train(self, run: Run) -> dict[str, Any]:
        """The record of a run, which is trained if it has none yet.

        Raises:
            ValueError: it has one, of another recipe, as the recipe's file has changed since.
        """
        record = self.record(run.name)
        if record:
            changed = checked_recipe(record["recipe"]).differences(run.resolved())
            if changed:
                raise ValueError(
                    f"{run.name}.json in {self.plan.folder} was made with another recipe "
                    f"({'; '.join(changed)}). Move it away, and the folder {run.name} in "
                    f"{self.runs}, to train the run anew."
                )
            return record
        folder = self.runs / run.name
        self._train_in_a_process(run, folder)
        record = training_record(run, folder)
        self.write(run.name, record)
        return record

    def _train_in_a_process(self, run: Run, folder: Path, *options: str) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "elita_command", "train", "--recipe", run.recipe]
        command += ["--data_dir", str(self.data_dir), "--run_dir", str(folder)]
        command += ["--set", *run.overrides, *options]
        log = folder.parent / f"{folder.name}.log"
        print(f"Training {run.name}", flush=True)
        with log.open("a", encoding="utf-8") as output:
            code = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
        if code:
            raise RuntimeError(f"{run.name} ended with {code}; what it said is in {log}.")

    def test(self, run: Run, *contexts: int | str) -> dict[str, Any]:
        """The record of a run with test figures at these window lengths, or carried."""
        record = self.train(run)
        for context in contexts:
            if str(context) not in record["test"]:
                print(f"Testing {run.name} at {context}", flush=True)
                figures = test_figures(self.runs / run.name, self.data_dir, context)
                record["test"][str(context)] = figures
                self.write(run.name, record)
        return record

    def validation_loss(self, run: Run) -> float:
        return self.train(run)["validation"]["loss"]

    # === Choices, on the validation split ===
    def tried_rates(self) -> list[float]:
        """The rates of the plan, and one further step for all where a best one lies at an end."""
        rates = list(self.plan.rates)
        if len(rates) < 3:
            return rates
        best = {self._best(name, rates) for name in self.plan.architectures}
        lower = [rates[0] / 2] if rates[0] in best else []
        return lower + rates + ([rates[-1] * 2] if rates[-1] in best else [])

    def _best(self, architecture: str, rates: list[float]) -> float:
        return min(rates, key=lambda rate: self.validation_loss(self.tuned(architecture, rate)))

    def best_rate(self, architecture: str) -> float:
        """The rate of the lowest validation loss."""
        return self._best(architecture, self.tried_rates())

    # === Parts ===
    def table(self) -> None:
        """The tuned table; the published schedule once each."""
        for seed in self.plan.seeds:
            for name in self.plan.architectures:
                self.test(self.seeded(name, seed), self.plan.lengths[0])
        for name in ("elita", "gla", "transformer"):
            self.test(self._run(f"{name}-wikitext2"), self.plan.lengths[0])

    def seeded(self, architecture: str, seed: int, *overrides: str) -> Run:
        """A run at the best rate; seed 0 is that which chose it."""
        own = (f"seed={seed}",) if seed else ()
        return self.tuned(architecture, self.best_rate(architecture), *overrides, *own)

    def timing(self) -> None:
        """Seconds a step and peak memory, in turn, with nothing else at work.

        A round that is complete is recorded, so that one is never made of two sittings.
        """
        rounds = self.record("timing").get("rounds", [])
        for turn in range(len(rounds), self.plan.timing_rounds):
            rounds.append({name: self._timed(name, turn) for name in self.plan.architectures})
            self.write("timing", {"kind": "timing", "rounds": rounds})

    def _timed(self, architecture: str, turn: int) -> dict[str, float]:
        steps = self.plan.timed_steps
        short = f"steps={steps}", f"validation_interval={steps}", "validation_batches=1"
        run = self.tuned(architecture, 3e-3, *short)
        folder = self.runs / f"timing-{turn}-{architecture}"
        self._train_in_a_process(run, folder, "--restart")
        return cost(run.resolved(), folder)

    def seconds(self, architecture: str) -> float:
        """The median of the timed steps."""
        self.timing()
        turns = [turn[architecture] for turn in self.record("timing")["rounds"]]
        return float(np.median([turn["seconds_per_step"] for turn in turns]))

    def equal_time(self) -> None:
        """Every linear architecture for as long as the Transformer's steps take."""
        for name in self.plan.architectures:
            if name != "transformer":
                for seed in self.plan.seeds if name == "elita_gated" else (0,):
                    self.test(self.in_equal_time(name, seed), self.plan.lengths[0])

    def in_equal_time(self, architecture: str, seed: int) -> Run:
        """As many steps as fit into the Transformer's time, its schedule ending with them."""
        ratio = self.seconds("transformer") / self.seconds(architecture)
        return self.seeded(architecture, seed, f"steps={round(self.plan.steps * ratio)}")

    def length(self) -> None:
        """Longer windows than those of the training, and one stream."""
        for name in self.plan.architectures:
            self.test(self.seeded(name, 0), *self.plan.lengths, CARRIED)
        for seed in self.plan.seeds:
            self.test(self.seeded("elita_gated", seed), self.plan.lengths[-1])

    def headline(self) -> None:
        """As many steps as the ELiTA authors took."""
        steps = self.plan.headline_steps
        interval = max(steps // 20, self.plan.validation_interval)
        overrides = f"steps={steps}", f"validation_interval={interval}"
        for name in ("elita_gated", "transformer"):
            self.test(self.seeded(name, 0, *overrides), self.plan.lengths[0])
        self.test(self._run("elita-wikitext2", *overrides), self.plan.lengths[0])

    def ablations(self) -> None:
        """One change at a time."""
        for architecture, overrides in map(ABLATIONS.get, self.plan.ablations):
            if architecture in self.plan.architectures:
                self.test(self.seeded(architecture, 0, *overrides), self.plan.lengths[0])

    def options(self) -> None:
        """Other options than the rate, by validation loss."""
        for overrides in map(OPTIONS.get, self.plan.options):
            for name in self.plan.options_tried_on:
                self.train(self.seeded(name, 0, *overrides))

    def larger(self) -> None:
        """About 5M parameters: does the order hold?"""
        steps = f"steps={self.plan.larger_steps}"
        for name in ("elita_gated", "transformer"):
            self.test(self.seeded(name, 0, *LARGER, steps), self.plan.lengths[0])

    def recall(self) -> None:
        """Multi-query associative recall."""
        for case in recall.cases(self.plan.recall_plan):
            if not self.record(case.name):
                print(f"Training {case.name}", flush=True)
                self.write(case.name, {"kind": "recall", **recall.run(case)})

    def parts(self) -> dict[str, Callable[[], None]]:
        """All parts by name, the most important first."""
        names = ("table", "timing", "equal_time", "length", "headline", "ablations", "recall")
        return {name: getattr(self, name) for name in (*names, "options", "larger")}


def training_record(run: Run, folder: Path) -> dict[str, Any]:
    """What a finished run folder says of its training."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    columns = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
    recipe = run.resolved()
    return {
        "kind": "run",
        "recipe_name": run.recipe,
        "overrides": list(run.overrides),
        "recipe": dataclasses.asdict(recipe),
        "versions": json.loads((folder / "versions.json").read_text(encoding="utf-8")),
        "parameters": summary["parameters"],
        "losses": {
            name: np.atleast_1d(columns[name]).round(5).tolist()
            for name in ("step", "loss", "val_loss")
        },
        "validation": {
            name: summary[f"validation_{name}"] for name in ("loss", "perplexity", "bits_per_byte")
        },
        **cost(recipe, folder),
        "test": {},
    }


def cost(recipe: Recipe, folder: Path) -> dict[str, float]:
    """Seconds a step, without the first and without validation, and the peak memory."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    tokens = recipe.batch_size * recipe.context_length
    return {
        "seconds_per_step": tokens / summary["tokens_per_second"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }


def test_figures(folder: Path, data_dir: Path, context: int | str) -> dict[str, Any]:
    """The figures of a run on the test split, in windows of `context` ids or as one stream.

    `late_loss` is over the labels at positions from 128 on of windows of the recipe's length, and
    so at such positions in windows of every multiple of it.
    """
    recipe = load_recipe(str(folder / "recipe.toml"))
    tokenizer = load_tokenizer(folder / "tokenizer")
    split = load_corpus(recipe.corpus, data_dir)["test"]
    token_ids = encode_split(tokenizer, split)
    keras.utils.clear_session()
    model = load_trained(folder, recipe, tokenizer.vocabulary_size())
    carried = context == CARRIED
    length = recipe.context_length if carried else int(context)
    rows = max(1, recipe.batch_size * recipe.context_length // length)
    losses, weights = label_losses(model, token_ids, length, rows, carried)
    positions = np.arange(len(losses))
    sums, counts = (np.bincount(positions % length, x) for x in (losses * weights, weights))
    late = positions % recipe.context_length >= LATE
    return {**report(split, sums, counts), "late_loss": float(np.average(losses[late]))}


def main(arguments: list[str] | None = None) -> None:
    """Does the parts that are asked for, all by default."""
    parser = command_parser("study", __doc__, "--data_dir wikitext-2-raw --short")
    parser.add_argument("--data_dir", type=path, required=True, help="holds wiki.{train,...}.raw")
    parser.add_argument("--short", action="store_true", help="every part, in about an hour")
    parser.add_argument("--parts", nargs="+", help="some of the parts, by name")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    plan = SHORT if options.short else FULL
    with explained(parser):
        results.require_own(plan.page)
        if not options.page:
            load_corpus("wikitext-2", options.data_dir)
        elif not any(plan.folder.glob("*.json")):
            raise ValueError(f"{plan.folder} holds no records to make a page of.")
    study = Study(plan, options.data_dir, Path("runs", plan.folder.name))
    chosen = [] if options.page else options.parts or list(study.parts())
    unknown = set(chosen) - set(study.parts())
    if unknown:
        parser.error(f"--parts: expected some of {list(study.parts())}, received {unknown}")
    for number, name in enumerate(chosen, start=1):
        print(f"Part {number} of {len(chosen)}: {name}", flush=True)
        study.parts()[name]()
    results.write_page(plan.folder, plan.page)
    print(f"Written: {plan.page}")
