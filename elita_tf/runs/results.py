"""The page of the study and its plots, made from the JSON files of `study.py` alone."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Record = dict[str, Any]
Draw = Callable[..., list[str]]  # `plot` beside the page; gives the Markdown that shows it
NAN = float("nan")  # what is not measured

# The usual values of the study. The part that a run belongs to follows from its other values.
GATED, SINES, TRANSFORMER = "elita_gated", "elita_query", "transformer"
ORDER = (GATED, SINES, "gla", "gla_ff2", TRANSFORMER)
TUNED, STEPS, HEADLINE_STEPS = "cosine", 450, 4_300
SIZE = {"num_layers": 3, "hidden_dim": 64}
MODEL = {"mixers": [], "mixer_options": {}, "feed_forward": "", "feed_forward_options": {}}
OPTIONS = {"warmup_steps": 30, "weight_decay": 0.0, "optimizer": "adam", "ema_momentum": 0.0}
LENGTHS, CARRIED = ("256", "1024", "4096", "16384"), "carried"
GATES = {"none": 23.21, "fixed": 16.55, "scalar": 15.56, "vector": 14.77}  # of GLA's paper
SOFTMAX, VALID = "softmax", 0.95
COST = ("seconds_per_step", "peak_memory_bytes")
RUN, LOSSES = ("architecture", "parameters", "rate"), ("validation loss", "test loss")  # columns


class Study:
    """The records of a folder. The content of a file, not its name, says what it records."""

    def __init__(self, folder: Path) -> None:
        files = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
        records = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        runs = [r["recipe"] | r["validation"] | r for r in records if r["kind"] == "run"]
        self.runs = sorted(runs, key=itemgetter("architecture", "learning_rate", "steps", "seed"))
        self.recall = [r for r in records if r["kind"] == "recall"]
        self.rounds = next((r["rounds"] for r in records if r["kind"] == "timing"), [])
        small = [run for run in self.runs if not _changed(run, SIZE)]
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
        if _changed(run, SIZE):
            return "larger"
        if changed := _changed(run):
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
        return _median(map(_test, runs)) - _median(map(_test, self.best("tokens", TRANSFORMER)))

    def cost(self, architecture: str, turns: list[Record] | None = None) -> tuple[float, float]:
        """Median seconds a step and median peak memory (bytes), by default of the timing."""
        turns = turns or [x[architecture] for x in self.rounds if architecture in x]
        return tuple(_median(turn[x] for turn in turns) for x in COST)

    def row(self, *runs: Record) -> dict[str, str]:
        """The cells of a table for runs that differ in the seed alone."""
        run, name, changed = runs[0], runs[0]["architecture"], _words(_changed(runs[0]))
        seconds, memory = self.cost(name, [run] if _changed(run, SIZE) else None)
        return {
            "architecture": f"`{name}`" + ", published schedule" * (run["schedule"] != TUNED),
            "what changes": f"`{changed}`" if changed else "nothing",
            "parameters": f"{run['parameters']:,}",
            "rate": f"{run['learning_rate']:g}",
            "steps": f"{run['steps']:,}",
            "seeds": f"{len(runs)}",
            "validation loss": _show(_median(run["loss"] for run in runs)),
            "test loss": _spread(map(_test, runs)),
            "bits per byte": _show(_median(_test(r, "bits_per_byte") for r in runs)),
            "word perplexity": _show(_median(_test(r, "word_perplexity") for r in runs), ".1f"),
            "seconds a step": _show(seconds),
            "of the Transformer's": _show(seconds / self.cost(TRANSFORMER)[0], ".1%"),
            "minutes": _show(run["steps"] * seconds / 60, ".1f"),
            "peak memory (GB)": _show(memory / 1e9, ".2f"),
            "minus the Transformer": _show(self.minus_transformer(list(runs)), "+.3f"),
        }


# === What runs say ===
def _changed(run: Record, usual: Record | None = None) -> Record:
    """What differs from the usual values, by default those of the model and of the options."""
    usual = usual or (MODEL | OPTIONS if run["schedule"] == TUNED else MODEL)
    return {key: run[key] for key, value in usual.items() if run.get(key, value) != value}


def _words(values: Record, prefix: str = "") -> str:
    """Settings as `key.key = value`."""
    texts = []
    for key, value in values.items():
        nested, plain = isinstance(value, dict), f"{prefix}{key} = {json.dumps(value)}"
        texts.append(_words(value, f"{prefix}{key}.") if nested else plain.replace('"', ""))
    return ", ".join(texts)


def _test(run: Record, figure: str = "loss", context: str = LENGTHS[0]) -> float:
    return run.get("test", {}).get(context, {}).get(figure, NAN)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and not np.isnan(value)]


def _median(values: Iterable[float | None]) -> float:
    known = _known(values)
    return float(np.median(known)) if known else NAN


# === How it is shown ===
def _show(value: float, form: str = ".3f") -> str:
    return "-" if np.isnan(value) else f"{value:{form}}"


def _spread(values: Iterable[float]) -> str:
    """The median, and the range where there are several."""
    known = _known(values)
    ends = f" ({min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
    return _show(_median(known)) + ends


def _table(rows: list[dict[str, str]], *columns: str) -> str:
    """A Markdown table of these columns, or of all; plain words if it has no row."""
    columns = columns or tuple(dict.fromkeys(column for row in rows for column in row))
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, rule, *([row.get(column, "-") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else "Not run yet."


def _targets(*targets: tuple[str, float, float]) -> str:
    """A list that says of each target whether its figure is at most its limit."""
    lines = ["Targets, by the seeds and rates that have been run so far:\n"]
    for text, value, limit in targets:
        verdict = f"**{'met' if value <= limit + 1e-9 else 'missed'}** ({value:.3f})"
        verdict = "not measured yet" if np.isnan(value) else verdict
        lines.append(f"- {text}: {verdict}.")
    return "\n".join(lines)


def plot(path: Path, curves: Record, labels: Any, log: bool = False, height: float = 0) -> None:
    """Draws curves of x and y; `log` for a logarithmic x, `height` to cut y above the lowest."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    curves = {name: np.array(points, float) for name, points in curves.items()}
    for name, (x, y) in curves.items():
        place = (*ORDER, *curves).index(name) % 10
        axes.plot(x, y, label=name, color=f"C{place}", marker="osD^vPX*<>"[place], markersize=5)
    if log:
        ticks = np.unique(np.concatenate([x for x, _ in curves.values()]))
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    if height:
        lowest = min(np.nanmin(y) for _, y in curves.values())
        axes.set_ylim(lowest - height / 20, min(lowest + height, axes.get_ylim()[1]))
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


# === Sections: paragraphs, tables, plots ===
def _setting(study: Study, _: Draw) -> list[str]:
    newest = max((r["versions"] for r in study.runs), key=lambda x: x["started"], default={})
    packages = ", ".join(f"{x} {newest.get(x, '-')}" for x in ("keras", "tensorflow", "python"))
    short = f"**This is a SHORT study ({study.steps} steps, not {STEPS}). Its figures say little.**"
    return [
        *([short] if study.steps < STEPS else []),
        "Text: WikiText-2 raw in 2,048 SentencePiece pieces. Models: 3 blocks of width 64. "
        "Training: 128 windows of 256 tokens a step, a warm-up of 30 steps, then the cosine "
        "schedule. Where runs differ from this, their section says so.",
        "Losses are in nats per token; lower is better. The validation split makes all choices. "
        "What is reported is the test split, every window from a fresh state. `-` stands for what "
        f"is not measured. Versions: {packages}, on {newest.get('cores', '-')} cores.",
    ]


def _equal_tokens(study: Study, _: Draw) -> list[str]:
    figures = (*RUN, "steps", "seeds", "test loss", "bits per byte", "seconds a step")
    columns = (*figures, "of the Transformer's", "peak memory (GB)")
    gated, ff2 = (study.minus_transformer(study.best("tokens", x)) for x in (GATED, "gla_ff2"))
    share = study.cost(GATED)[0] / study.cost(TRANSFORMER)[0]
    return [
        f"Every architecture sees the same tokens, {study.steps} steps of them, at its best rate: "
        "that of its lowest validation loss with seed 0 (section 8). The test loss is the median "
        "over the seeds, with the range. Time and memory are medians of processes that took turns "
        "with nothing else at work; the memory is that of the whole process.",
        _table([study.row(*runs) for runs in study.groups("tokens")], *columns),
        "The published schedule, min(1e-3, 1e-2 / sqrt(step)), once each:",
        _table([study.row(x) for x in study.part("published")], *RUN, "steps", *LOSSES),
        _targets(
            ("`elita_gated` is at least 0.04 below the Transformer", gated, -0.04),
            ("`gla_ff2` is at or below the Transformer", ff2, 0.0),
            ("A step of `elita_gated` takes at most 0.40 of the Transformer's", share, 0.40),
        ),
    ]


def _equal_time(study: Study, draw: Draw) -> list[str]:
    groups, reference, curves = study.groups("time"), study.best("tokens", TRANSFORMER), {}
    groups += [reference] if groups and reference else []
    for run, *_ in groups if study.rounds else []:
        minutes = np.multiply(run["losses"]["step"], study.cost(run["architecture"])[0] / 60)
        curves[run["architecture"]] = minutes, run["losses"]["val_loss"]
    columns = ("architecture", "steps", "minutes", "seeds", "test loss", "bits per byte")
    gated = study.minus_transformer(study.best("time", GATED))
    labels = "training time (minutes)", "validation loss (nats per token)"
    return [
        f"Every linear architecture trains for as long as the Transformer's {study.steps} steps "
        "take, by the seconds a step of section 2 and at the rate chosen there. Its schedule ends "
        "with its last step.",
        _table([study.row(*runs) for runs in groups], *columns, "minus the Transformer"),
        *draw("equal_time", curves, labels, height=1.2),
        _targets(("`elita_gated` is at least 0.20 below the Transformer", gated, -0.20)),
    ]


def _length(study: Study, draw: Draw) -> list[str]:
    rows, curves, contexts = [], {}, (*LENGTHS, CARRIED)
    for name, run in sorted(study.own.items()):
        late = {x: _test(run, "late_loss", x) for x in contexts}
        if len(_known(late.values())) > 1:
            rows.append({"architecture": f"`{name}`"} | {x: _show(y) for x, y in late.items()})
            curves[name] = [int(x) for x in LENGTHS], [late[x] for x in LENGTHS]
    gated = study.best("tokens", GATED)
    rises = [_test(r, "late_loss", LENGTHS[-1]) - _test(r, "late_loss") for r in gated]
    labels = "length of the windows (tokens)", "test loss of the same labels (nats per token)"
    return [
        "The models of section 2 with seed 0 read longer windows than those they were trained on, "
        "and the whole split as one stream (carried). The same labels count at every length: those "
        "at positions from 128 on of windows of 256. The plot ends at 0.6 above the lowest loss.",
        _table(rows),
        *draw("length", curves, labels, log=True, height=0.6),
        _targets(
            ("`elita_gated` at 16,384 is at most 0.01 above itself at 256", _median(rises), 0.01)
        ),
    ]


def _headline(study: Study, draw: Draw) -> list[str]:
    rows, positions, curves = [], {}, {}
    for run in study.part("headline"):
        row, nothing = study.row(run), {"loss_by_position": []}
        buckets = run["test"].get(LENGTHS[0], nothing)["loss_by_position"]
        by_position = {f"from {x['start']}": _show(x["loss"]) for x in buckets}
        seen, losses = [x["start"] + 1 for x in buckets], [x["loss"] for x in buckets]
        curves[row["architecture"].replace("`", "")] = seen, losses
        rows.append(row | by_position)
        positions |= by_position
    labels = "tokens of the window read so far", "test loss (nats per token)"
    return [
        f"As many steps as the ELiTA authors took: {HEADLINE_STEPS:,} in the full study. They have "
        "4.47 for ELiTA and 4.49 for a Transformer, with a vocabulary of the same size.",
        _table(rows, *RUN, "steps", *LOSSES, "bits per byte", "word perplexity"),
        "By the position of the label in its window; a column ends where the next one begins:",
        _table(rows, "architecture", *positions),
        *draw("headline", curves, labels, log=True),
    ]


def _ablations(study: Study, _: Draw) -> list[str]:
    rows, gates, runs = [], [], study.best("ablations")
    for name in dict.fromkeys(run["architecture"] for run in runs):
        own = study.own.get(name, {})
        sines = study.own.get(SINES, {}) if name == GATED else {}
        changed = [run for run in runs if run["architecture"] == name]
        for run in filter(None, [own, sines, *changed]):
            rows.append(study.row(run) | {"difference": _show(_test(run) - _test(own), "+.3f")})
    gla = study.best("ablations", "gla")
    by_gate = {run["mixer_options"].get("gla", {}).get("gate"): run for run in gla}
    by_gate["vector"] = study.own.get("gla")
    for gate, perplexity in GATES.items():
        if run := by_gate.get(gate):
            gates.append(study.row(run) | {"gate": gate, "paper's perplexity": f"{perplexity}"})
    return [
        "The runs of section 2 with seed 0, and one change at a time. The last column is the test "
        "loss minus that without the change. `elita_query` has sines in place of the gate.",
        _table(rows, "architecture", "what changes", "parameters", *LOSSES, "difference"),
        "GLA by its gate, and the perplexity in its paper (340M parameters, 7B tokens, on the "
        "training text):",
        _table(gates, "gate", "parameters", *LOSSES, "paper's perplexity"),
    ]


def _recall(study: Study, draw: Draw) -> list[str]:
    runs = sorted(study.recall, key=lambda run: (run["validation_accuracy"], -run["rate"]))
    best, rows, curves = {run["model"]: run for run in runs}, [], {}
    for name, run in sorted(best.items()):
        by_pairs = run["test_accuracy_by_pairs"]
        row = {"model": name, "rate": f"{run['rate']:g}", "parameters": f"{run['parameters']:,}"}
        row |= {f"{x} pairs": f"{y:.1%}" for x, y in by_pairs.items()}
        rows.append(row | {"all": f"{run['test_accuracy']:.1%}"})
        curves[name] = [int(x) for x in by_pairs], [100 * y for y in by_pairs.values()]
    softmax = best.get(SOFTMAX, {}).get("test_accuracy", NAN)
    behind = [name for name, run in sorted(best.items()) if run["test_accuracy"] < softmax]
    sizes = {x: y for run in runs for x, y in run["task"].items() if isinstance(y, int)}
    return [
        "Multi-query associative recall: a sequence holds pairs of a key and a value, then every "
        "key again, and the model is to say its value. Each model has the rate of its best "
        "validation accuracy. The figures are the shares of right values in the test examples. "
        f"Sizes: {_words(sizes) or '-'}.",
        _table(rows),
        f"The task is valid if softmax, which can do it, reaches {VALID:.0%}. It reaches "
        f"{_show(softmax, '.1%')}: {'valid' if softmax >= VALID else 'not shown to be valid'}. "
        f"Softmax is ahead of: {', '.join(behind) or 'none'}.",
        *draw("recall", curves, ("pairs in the sequence", "accuracy (%)"), log=True),
    ]


def _rates_and_options(study: Study, _: Draw) -> list[str]:
    rows, options, table = {}, {}, []
    for run in study.tried:
        name, loss = run["architecture"], _show(run["loss"])
        row = rows.setdefault(name, {"architecture": f"`{name}`"})
        row[f"{run['learning_rate']:g}"] = f"**{loss}**" if run is study.own.get(name) else loss
    rates = sorted({run["learning_rate"] for run in study.tried})
    for run in study.best("options"):
        name, words = run["architecture"], _words(_changed(run))
        own = study.own.get(name, {"loss": NAN})
        options.setdefault(words, {})[f"`{name}`"] = run["loss"] - own["loss"]
    for words, changes in options.items():
        mean = sum(changes.values()) / len(changes)
        kept = "-" if np.isnan(mean) else "yes" if mean < 0 else "no"
        row = {name: _show(x, "+.3f") for name, x in [("mean", mean), *changes.items()]}
        table.append({"what changes": f"`{words}`", "kept": kept} | row)
    return [
        "Validation losses with seed 0 by the peak of the rate, the best of each in bold:",
        _table(list(rows.values()), "architecture", *(f"{rate:g}" for rate in rates)),
        "Other options at the best rate: the validation loss minus that of a warm-up of 30 steps, "
        "no weight decay, Adam and no averages. An option is kept, for all, if the mean improves.",
        _table(table),
    ]


def _a_larger_size(study: Study, _: Draw) -> list[str]:
    rows = [study.row(run) for run in study.part("larger")]
    text = "6 blocks of width 256, at the rates of section 2: does the order hold?"
    return [text, _table(rows, *RUN, "steps", *LOSSES, "bits per byte", "seconds a step")]


SECTIONS = (  # The name of each is its title.
    *(_setting, _equal_tokens, _equal_time, _length, _headline, _ablations, _recall),
    *(_rates_and_options, _a_larger_size),
)
AGAIN = (
    "`make study DATA_DIR=...`, with the folder of `wiki.{train,valid,test}.raw`, does all of it, "
    "and goes on where it was stopped. With `STUDY=short` it does a little of every part."
)


def write_page(folder: Path, page: Path) -> None:
    """Writes the page, and its plots beside it, from the JSON files in the folder."""
    study, plots = Study(folder), page.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)

    def draw(name: str, curves: Record, labels: Any, **options: Any) -> list[str]:
        path = plots / f"{name}.png"
        if not curves:
            path.unlink(missing_ok=True)
            return []
        plot(path, curves, labels, **options)
        return [f"![{labels[1]} by {labels[0]}]({plots.name}/{path.name})"]

    text = ["# Results", "`elita_tf/runs/results.py` makes this page from the runs' JSON files."]
    for number, section in enumerate(SECTIONS, start=1):
        title = section.__name__.strip("_").replace("_", " ").capitalize()
        text += [f"## {number}. {title}", *section(study, draw)]
    text += [f"## {len(SECTIONS) + 1}. How to make it again", AGAIN]
    page.write_text("\n\n".join(text) + "\n", encoding="utf-8")
