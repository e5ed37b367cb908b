"""The page of the study and its plots, made from the JSON files of `study.py` alone."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from elita_tf.runs.records import (
    CARRIED,
    GATED,
    HEADLINE_STEPS,
    LENGTHS,
    NAN,
    ORDER,
    SINES,
    SIZE,
    STEPS,
    TRANSFORMER,
    TUNED,
    Record,
    Records,
    changes,
    measured,
    median,
    test_figure,
    words,
)

Draw = Callable[..., list[str]]  # `plot` beside the page; gives the Markdown that shows it
GATES = {"none": 23.21, "fixed": 16.55, "scalar": 15.56, "vector": 14.77}  # of GLA's paper
SOFTMAX, VALID = "softmax", 0.95
RUN, LOSSES = ("architecture", "parameters", "rate"), ("validation loss", "test loss")  # columns


# === How it is shown ===
def _show(value: float, form: str = ".3f") -> str:
    return "-" if np.isnan(value) else f"{value:{form}}"


def _spread(values: Iterable[float]) -> str:
    """The median, and the range where there are several."""
    known = measured(values)
    ends = f" ({min(known):.3f} to {max(known):.3f})" if len(known) > 1 else ""
    return _show(median(known)) + ends


def _row(study: Records, *runs: Record) -> dict[str, str]:
    """The cells of a table for runs that differ in the seed alone."""
    run, name, changed = runs[0], runs[0]["architecture"], words(changes(runs[0]))
    seconds, memory = study.cost(name, [run] if changes(run, SIZE) else None)
    return {
        "architecture": f"`{name}`" + ", published schedule" * (run["schedule"] != TUNED),
        "what changes": f"`{changed}`" if changed else "nothing",
        "parameters": f"{run['parameters']:,}",
        "rate": f"{run['learning_rate']:g}",
        "steps": f"{run['steps']:,}",
        "seeds": f"{len(runs)}",
        "validation loss": _show(median(run["loss"] for run in runs)),
        "test loss": _spread(map(test_figure, runs)),
        "bits per byte": _show(median(test_figure(r, "bits_per_byte") for r in runs)),
        "word perplexity": _show(median(test_figure(r, "word_perplexity") for r in runs), ".1f"),
        "seconds a step": _show(seconds),
        "of the Transformer's": _show(seconds / study.cost(TRANSFORMER)[0], ".1%"),
        "minutes": _show(run["steps"] * seconds / 60, ".1f"),
        "peak memory (GB)": _show(memory / 1e9, ".2f"),
        "minus the Transformer": _show(study.minus_transformer(list(runs)), "+.3f"),
    }


def _table(caption: str, rows: list[dict[str, str]], *columns: str) -> list[str]:
    """A caption and a Markdown table of these columns, or of all; nothing if it has no row."""
    columns = columns or tuple(dict.fromkeys(column for row in rows for column in row))
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = [columns, rule, *([row.get(column, "-") for column in columns] for row in rows)]
    return [caption, "\n".join(f"| {' | '.join(line)} |" for line in lines)] if rows else []


def _targets(*targets: tuple[str, float, float]) -> list[str]:
    """A list that says of each target whether its figure is at most its limit."""
    lines = ["Targets, by the seeds and rates that have been run so far:\n"]
    for text, value, limit in targets:
        verdict = f"**{'met' if value <= limit + 1e-9 else 'missed'}** ({value:.3f})"
        verdict = "not measured yet" if np.isnan(value) else verdict
        lines.append(f"- {text}: {verdict}.")
    return ["\n".join(lines)] if measured(value for _, value, _ in targets) else []


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


# === Sections: the results of each, in paragraphs; nothing where none is recorded ===
def _setting(study: Records, _: Draw) -> list[str]:
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


def _equal_tokens(study: Records, _: Draw) -> list[str]:
    rows = [_row(study, *runs) for runs in study.groups("tokens")]
    timed = [row for row in rows if row["seconds a step"] != "-"]
    costs = "seconds a step", "of the Transformer's", "peak memory (GB)"
    gated, ff2 = (study.minus_transformer(study.best("tokens", x)) for x in (GATED, "gla_ff2"))
    share = study.cost(GATED)[0] / study.cost(TRANSFORMER)[0]
    return [
        *_table(
            f"Every architecture sees the same tokens, {study.steps} steps of them, at its best "
            "rate: that of its lowest validation loss with seed 0 (see the rates below). The test "
            "loss is the median over the seeds, with the range.",
            rows,
            *(*RUN, "seeds", "test loss", "bits per byte"),
        ),
        *_table(
            "Time and memory are medians of processes that took turns with nothing else at work; "
            "the memory is that of the whole process:",
            timed,
            *("architecture", *costs),
        ),
        *_table(
            "The published schedule, min(1e-3, 1e-2 / sqrt(step)), once each:",
            [_row(study, run) for run in study.part("published")],
            *(*RUN, "steps", *LOSSES),
        ),
        *_targets(
            ("`elita_gated` is at least 0.04 below the Transformer", gated, -0.04),
            ("`gla_ff2` is at or below the Transformer", ff2, 0.0),
            ("A step of `elita_gated` takes at most 0.40 of the Transformer's", share, 0.40),
        ),
    ]


def _equal_time(study: Records, draw: Draw) -> list[str]:
    groups, reference, curves = study.groups("time"), study.best("tokens", TRANSFORMER), {}
    groups += [reference] if groups and reference else []
    for run, *_ in groups if study.rounds else []:
        minutes = np.multiply(run["losses"]["step"], study.cost(run["architecture"])[0] / 60)
        curves[run["architecture"]] = minutes, run["losses"]["val_loss"]
    columns = ("architecture", "steps", "minutes", "seeds", "test loss", "bits per byte")
    gated = study.minus_transformer(study.best("time", GATED))
    labels = "training time (minutes)", "validation loss (nats per token)"
    return [
        *_table(
            f"Every linear architecture trains for as long as the Transformer's {study.steps} "
            "steps take, by the seconds a step and at the rate of the table above. Its schedule "
            "ends with its last step.",
            [_row(study, *runs) for runs in groups],
            *(*columns, "minus the Transformer"),
        ),
        *draw("equal_time", curves, labels, height=1.2),
        *_targets(("`elita_gated` is at least 0.20 below the Transformer", gated, -0.20)),
    ]


def _length(study: Records, draw: Draw) -> list[str]:
    rows, curves, contexts = [], {}, (*LENGTHS, CARRIED)
    for name, run in sorted(study.own.items()):
        late = {x: test_figure(run, "late_loss", x) for x in contexts}
        if len(measured(late.values())) > 1:
            rows.append({"architecture": f"`{name}`"} | {x: _show(y) for x, y in late.items()})
            curves[name] = [int(x) for x in LENGTHS], [late[x] for x in LENGTHS]
    gated = study.best("tokens", GATED)
    rises = [test_figure(r, "late_loss", LENGTHS[-1]) - test_figure(r, "late_loss") for r in gated]
    labels = "length of the windows (tokens)", "test loss of the same labels (nats per token)"
    return [
        *_table(
            "The models of the first table with seed 0 read longer windows than those they were "
            "trained on, and the whole split as one stream (carried). The same labels count at "
            "every length: those at positions from 128 on of windows of 256. The plot ends at 0.6 "
            "above the lowest loss.",
            rows,
        ),
        *draw("length", curves, labels, log=True, height=0.6),
        *_targets(
            (
                "`elita_gated` at 16,384 is at most 0.01 above itself at 256",
                median(rises),
                0.01,
            )
        ),
    ]


def _headline(study: Records, draw: Draw) -> list[str]:
    rows, positions, curves = [], {}, {}
    for run in study.part("headline"):
        row, nothing = _row(study, run), {"loss_by_position": []}
        buckets = run["test"].get(LENGTHS[0], nothing)["loss_by_position"]
        by_position = {f"from {x['start']}": _show(x["loss"]) for x in buckets}
        seen, losses = [x["start"] + 1 for x in buckets], [x["loss"] for x in buckets]
        curves[row["architecture"].replace("`", "")] = seen, losses
        rows.append(row | by_position)
        positions |= by_position
    labels = "tokens of the window read so far", "test loss (nats per token)"
    return [
        *_table(
            f"As many steps as the ELiTA authors took: {HEADLINE_STEPS:,} in the full study. They "
            "have 4.47 for ELiTA and 4.49 for a Transformer, with a vocabulary of the same size.",
            rows,
            *(*RUN, "steps", *LOSSES, "bits per byte", "word perplexity"),
        ),
        *_table(
            "By the position of the label in its window; a column ends where the next one begins:",
            rows if positions else [],
            *("architecture", *positions),
        ),
        *draw("headline", curves, labels, log=True),
    ]


def _ablations(study: Records, _: Draw) -> list[str]:
    rows, gates, runs = [], [], study.best("ablations")
    for name in dict.fromkeys(run["architecture"] for run in runs):
        own = study.own.get(name, {})
        sines = study.own.get(SINES, {}) if name == GATED else {}
        changed = [run for run in runs if run["architecture"] == name and not run["seed"]]
        for run in filter(None, [own, sines, *changed]):
            rows.append(
                _row(study, run)
                | {"difference": _show(test_figure(run) - test_figure(own), "+.3f")}
            )
    gla = study.best("ablations", "gla")
    by_gate = {run["mixer_options"].get("gla", {}).get("gate"): run for run in gla}
    by_gate["vector"] = study.own.get("gla")
    for gate, perplexity in GATES.items():
        if run := by_gate.get(gate):
            gates.append(_row(study, run) | {"gate": gate, "paper's perplexity": f"{perplexity}"})
    return [
        *_table(
            "The runs of the first table with seed 0, and one change at a time. The last column is "
            "the test loss minus that without the change. `elita_query` has sines in place of the "
            "gate.",
            rows,
            *("architecture", "what changes", "parameters", *LOSSES, "difference"),
        ),
        *_table(
            "GLA by its gate, and the perplexity in its paper (340M parameters, 7B tokens, on the "
            "training text):",
            gates if gla else [],
            *("gate", "parameters", *LOSSES, "paper's perplexity"),
        ),
    ]


def _recall(study: Records, draw: Draw) -> list[str]:
    runs = sorted(study.recall, key=lambda run: (run["validation_accuracy"], -run["rate"]))
    best, rows, curves = {run["model"]: run for run in runs}, [], {}
    rates = {name: sorted(run["rate"] for run in runs if run["model"] == name) for name in best}
    for name, run in sorted(best.items()):
        by_pairs = run["test_accuracy_by_pairs"]
        row = {"model": name, "rate": f"{run['rate']:g}", "parameters": f"{run['parameters']:,}"}
        row |= {"of the rates": ", ".join(f"{rate:g}" for rate in rates[name])}
        row |= {f"{x} pairs": f"{y:.1%}" for x, y in by_pairs.items()}
        rows.append(row | {"all": f"{run['test_accuracy']:.1%}"})
        curves[name] = [int(x) for x in by_pairs], [100 * y for y in by_pairs.values()]
    softmax = best.get(SOFTMAX, {}).get("test_accuracy", NAN)
    below = [name for name, run in sorted(best.items()) if run["test_accuracy"] < VALID]
    sizes = {x: y for run in runs for x, y in run["task"].items() if isinstance(y, int)}
    verdict = (
        f"The task is valid if softmax, which can do it, reaches {VALID:.0%}. It reaches "
        f"{_show(softmax, '.1%')}: {'valid' if softmax >= VALID else 'not shown to be valid'}. "
        f"Below that are: {', '.join(below) or 'none'}."
    )
    return [
        *_table(
            "Multi-query associative recall: a sequence holds pairs of a key and a value, then "
            "every key again, and the model is to say its value. A model has two blocks. The first "
            "sees the position before: it is softmax over two positions, or the one that is named "
            "first. Every training example comes once. Each model has the rate of its best "
            "validation accuracy. The figures are the shares of right values in the test "
            f"examples. Sizes: {words(sizes)}.",
            rows,
        ),
        *([verdict] if SOFTMAX in best else []),
        *draw("recall", curves, ("pairs in the sequence", "accuracy (%)"), log=True),
    ]


def _rates_and_options(study: Records, _: Draw) -> list[str]:
    rows, options, table = {}, {}, []
    for run in study.tried:
        name, loss = run["architecture"], _show(run["loss"])
        row = rows.setdefault(name, {"architecture": f"`{name}`"})
        row[f"{run['learning_rate']:g}"] = f"**{loss}**" if run is study.own.get(name) else loss
    rates = sorted({run["learning_rate"] for run in study.tried})
    for run in study.best("options"):
        name, option = run["architecture"], words(changes(run))
        own = study.own.get(name, {"loss": NAN})
        options.setdefault(option, {})[f"`{name}`"] = run["loss"] - own["loss"]
    for option, differences in options.items():
        mean = sum(differences.values()) / len(differences)
        kept = "-" if np.isnan(mean) else "yes" if mean < 0 else "no"
        row = {name: _show(x, "+.3f") for name, x in [("mean", mean), *differences.items()]}
        table.append({"what changes": f"`{option}`", "kept": kept} | row)
    return [
        *_table(
            "Validation losses with seed 0 by the peak of the rate, the best of each in bold:",
            list(rows.values()),
            *("architecture", *(f"{rate:g}" for rate in rates)),
        ),
        *_table(
            "Other options at the best rate: the validation loss minus that of a warm-up of 30 "
            "steps, no weight decay, Adam and no averages. An option is kept, for all, if the mean "
            "improves.",
            table,
        ),
    ]


def _a_larger_size(study: Records, _: Draw) -> list[str]:
    rows = [_row(study, run) for run in study.part("larger")]
    caption = "6 blocks of width 256, at the rates of the first table: does the order hold?"
    return _table(caption, rows, *RUN, "steps", *LOSSES, "bits per byte", "seconds a step")


SECTIONS = (  # The name of each is its title.
    *(_setting, _equal_tokens, _equal_time, _length, _headline, _ablations, _recall),
    *(_rates_and_options, _a_larger_size),
)
ORIGIN = "`elita_tf/runs/results.py` makes this page from the runs' JSON files."
AGAIN = (
    "`make study DATA_DIR=...`, with the folder of `wiki.{train,valid,test}.raw`, does all of it, "
    "and goes on where it was stopped. With `STUDY=short` it does a little of every part."
)


def require_own(page: Path) -> None:
    """Raises ValueError for a page that is none of ours, as writing one would replace it."""
    if page.is_file() and ORIGIN not in page.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"{page} is not the page of a study, and this study would replace it. Move it away, or "
            "begin in another folder."
        )


def write_page(folder: Path, page: Path) -> None:
    """Writes the page, and its plots beside it, from the JSON files in the folder.

    Raises:
        ValueError: the page is there, and not one of a study.
    """
    require_own(page)
    study, plots = Records(folder), page.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)

    def draw(name: str, curves: Record, labels: Any, **options: Any) -> list[str]:
        path = plots / f"{name}.png"
        if not curves:
            path.unlink(missing_ok=True)
            return []
        plot(path, curves, labels, **options)
        return [f"![{labels[1]} by {labels[0]}]({plots.name}/{path.name})"]

    text = ["# Results", ORIGIN]
    missing = []
    for section in SECTIONS:
        title = section.__name__.strip("_").replace("_", " ").capitalize()
        paragraphs = section(study, draw)
        text += [f"## {title}", *paragraphs] if paragraphs else []
        missing += [] if paragraphs else [title.lower()]
    not_run = [f"Not run yet: {', '.join(missing)}."] if missing else []
    text += ["## How to make it again", *not_run, AGAIN]
    page.write_text("\n\n".join(text) + "\n", encoding="utf-8")
