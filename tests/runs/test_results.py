import json

import pytest

from elita_tf.runs import results

DEFAULTS = {
    "num_layers": 3,
    "hidden_dim": 64,
    "schedule": "cosine",
    "learning_rate": 0.006,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "warmup_steps": 30,
    "mixers": [],
    "mixer_options": {},
    "feed_forward": "",
    "feed_forward_options": {},
    "steps": 450,
    "seed": 0,
}
GATED, GLA, FF2, TRANSFORMER = "elita_gated", "gla", "gla_ff2", "transformer"


def a_run(architecture, validation, test=None, late=None, **recipe):
    """A record as `study.training_record` makes it; `late` by length; a test loss at 256."""
    recipe = DEFAULTS | {"architecture": architecture} | recipe
    late = {"256": test} | (late or {}) if test is not None else {}
    return {
        "kind": "run",
        "recipe_name": f"{architecture}-tuned",
        "overrides": [],
        "recipe": recipe,
        "versions": {
            "started": f"2026-01-01T00:00:{recipe['seed']:02}+00:00",
            "python": "3.12.1",
            "keras": f"3.15.{recipe['seed']}",
            "tensorflow": "2.21.0",
            "cores": 2,
        },
        "parameters": 275_000,
        "losses": {
            "step": [50, recipe["steps"]],
            "loss": [5.5, 4.0],
            "val_loss": [5.0, validation],
        },
        "validation": {"loss": validation, "perplexity": 1.0, "bits_per_byte": 2.0},
        "seconds_per_step": 7.5,
        "peak_memory_bytes": 3_000_000_000,
        "test": {length: on_the_test_split(test, loss) for length, loss in late.items()},
    }


def on_the_test_split(loss, late):
    """Test figures, of which bits per byte and the losses by position follow the loss."""
    buckets = [{"start": x, "stop": max(1, 2 * x), "loss": loss + 2 / (1 + x)} for x in (0, 1, 2)]
    figures = {"loss": loss, "bits_per_byte": loss / 2, "word_perplexity": 100.0}
    return figures | {"late_loss": late, "loss_by_position": buckets}


def timed(**seconds):
    """A timing record of three rounds, of which the middle one is the median."""
    rounds = [
        {n: {"seconds_per_step": x * y, "peak_memory_bytes": 2.5e9 * y} for n, x in seconds.items()}
        for y in (1.5, 1, 0.9)
    ]
    return {"kind": "timing", "rounds": rounds}


def recalled(model, rate, validation, test):
    return {
        "kind": "recall",
        "task": {"length": 64, "pairs": [4, 16]},
        "model": model,
        "rate": rate,
        "steps": 400,
        "parameters": 100_000,
        "validation_accuracy": validation,
        "test_accuracy": test,
        "test_accuracy_by_pairs": {"4": test + 0.02, "16": test - 0.02},
        "losses": [[40, 3.0]],
        "seconds": 60.0,
    }


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Writes the page of some records, and reads it; without plots, which take time."""
    monkeypatch.setattr(results, "plot", lambda path, *_, **__: path.touch())
    return lambda *records: written(tmp_path, *records)


def written(folder, *records):
    """The page of these records."""
    (folder / "study").mkdir(exist_ok=True)
    for number, record in enumerate(records):
        (folder / "study" / f"{number:02}.json").write_text(json.dumps(record))
    results.write_page(folder / "study", folder / "docs" / "results.md")
    return (folder / "docs" / "results.md").read_text()


def section(page, title):
    """The text of a section."""
    for text in page.split("\n## ")[1:]:
        if text.split("\n")[0] == title:
            return text
    raise AssertionError(f"no section {title}")


def rows(text):
    """The rows of all tables of a text: a dict of the cells by title each."""
    found = []
    for block in text.strip().split("\n\n"):
        if block.startswith("|"):
            head, _, *lines = [line.strip("| ").split(" | ") for line in block.split("\n")]
            found += [dict(zip(head, line, strict=True)) for line in lines]
    return found


def row(text, first):
    """The only row whose first cell is this."""
    (found,) = [cells for cells in rows(text) if next(iter(cells.values())) == first]
    return found


def full_study():
    """Records of every part."""
    records = [
        a_run(GATED, 3.95, 3.97, {"1024": 3.96, "16384": 3.95, "carried": 3.94}),
        a_run(GATED, 4.05, 3.90, learning_rate=0.003),
        a_run(GATED, 3.96, 3.99, {"16384": 3.98}, seed=1),
        a_run(GATED, 3.94, 3.90, {"16384": 3.97}, seed=2),
        a_run("elita_query", 4.1, 4.12, {"1024": 4.9, "4096": 5.4, "16384": 5.6}),
        a_run(GLA, 4.03, 4.06),
        a_run(FF2, 4.02, 4.05, {"1024": 4.04}),
        a_run(TRANSFORMER, 4.0, 4.02, {"1024": 4.6, "4096": 6.1, "16384": 7.3}),
        a_run(TRANSFORMER, 4.05, 4.06, learning_rate=0.003),
        a_run(GATED, 3.7, 3.75, steps=1_184),
        a_run(GATED, 3.7, 3.77, steps=1_184, seed=1),
        a_run(FF2, 3.9, 3.93, steps=900),
        a_run("elita_query", 4.6, 4.62, schedule="capped_inverse_sqrt", warmup_steps=0),
        a_run(GATED, 3.5, 3.52, steps=4_300),
        a_run(TRANSFORMER, 3.6, 3.63, steps=4_300),
        a_run("elita_query", 4.0, 4.01, schedule="capped_inverse_sqrt", steps=4_300),
        a_run(GATED, 3.3, 3.35, num_layers=6, hidden_dim=256, steps=225),
        a_run(GATED, 4.2, 4.21, mixer_options={"attention2_gated": {"decay": "learned"}}),
        a_run(GATED, 3.98, 3.99, feed_forward="swiglu"),
        a_run(GATED, 3.93, 3.96, mixers=["attention2_gated", "gla", "softmax"]),
        a_run(GLA, 4.5, 4.51, mixer_options={"gla": {"gate": "none"}}),
        a_run(GATED, 3.93, warmup_steps=100),
        a_run(TRANSFORMER, 4.01, warmup_steps=100),
        a_run(GATED, 3.96, optimizer="muon"),
        timed(elita_gated=0.38, elita_query=0.3, gla=0.45, gla_ff2=0.5, transformer=1.0),
        recalled("softmax", 0.001, 0.95, 0.97),
        recalled("softmax", 0.01, 0.97, 0.96),
        recalled("gated", 0.01, 0.5, 0.51),
    ]
    return records


def test_every_part_is_in_its_section(page, tmp_path):
    text = page(*full_study())

    assert "Not run yet" not in text
    assert "SHORT" not in text
    assert "keras 3.15.2, tensorflow 2.21.0, python 3.12.1, on 2 cores" in text
    plots = sorted(path.name for path in (tmp_path / "docs" / "results").iterdir())
    assert plots == ["equal_time.png", "headline.png", "length.png", "recall.png"]
    for name in plots:
        assert f"](results/{name})" in text


def test_equal_tokens(page):
    text = section(page(*full_study()), "Equal tokens")

    losses, costs = (
        {x["architecture"]: x for x in rows(text) if column in x and "steps" not in x}
        for column in ("test loss", "seconds a step")
    )
    gated = losses["`elita_gated`"]
    assert (gated["parameters"], gated["seeds"]) == ("275,000", "3")
    assert gated["test loss"] == "3.970 (3.900 to 3.990)"
    assert gated["bits per byte"] == "1.985"
    assert losses["`transformer`"]["test loss"] == "4.020"
    gated = costs["`elita_gated`"]
    assert gated["seconds a step"] == "0.380"
    assert gated["of the Transformer's"] == "38.0%"
    assert gated["peak memory (GB)"] == "2.50"
    assert len(losses) == len(costs) == 5
    assert row(text, "`elita_query`, published schedule")["test loss"] == "4.620"


def test_the_best_rate_is_that_of_the_lowest_validation_loss_and_not_of_the_test(page):
    text = page(*full_study())

    assert rows(section(text, "Equal tokens"))[0]["rate"] == "0.006"
    rates = row(section(text, "Rates and options"), "`elita_gated`")
    assert (rates["0.003"], rates["0.006"]) == ("4.050", "**3.950**")


def test_equal_time(page):
    text = section(page(*full_study()), "Equal time")

    gated, transformer = row(text, "`elita_gated`"), row(text, "`transformer`")
    assert (gated["steps"], gated["minutes"], gated["seeds"]) == ("1,184", "7.5", "2")
    assert gated["test loss"] == "3.760 (3.750 to 3.770)"
    assert gated["minus the Transformer"] == "-0.260"
    assert (transformer["steps"], transformer["minutes"]) == ("450", "7.5")
    assert {cells["steps"] for cells in rows(text)} == {"1,184", "900", "450"}


def test_length_shows_the_same_labels_of_seed_0(page):
    text = section(page(*full_study()), "Length")

    gated = row(text, "`elita_gated`")
    assert [gated[x] for x in ("256", "4096", "16384", "carried")] == [
        "3.970",
        "-",
        "3.950",
        "3.940",
    ]
    assert row(text, "`transformer`")["16384"] == "7.300"
    assert len(rows(text)) == 4  # not those that were tested at 256 alone


def test_headline(page):
    losses, positions = {}, {}
    for cells in rows(section(page(*full_study()), "Headline")):
        (losses if "steps" in cells else positions)[cells["architecture"]] = cells

    assert set(losses) == {"`elita_gated`", "`transformer`", "`elita_query`, published schedule"}
    assert losses["`elita_gated`"]["test loss"] == "3.520"
    assert positions["`elita_gated`"]["from 0"] == "5.520"
    assert positions["`transformer`"]["from 2"] == "4.297"


def test_ablations_say_what_changes_and_by_how_much(page):
    changes = {}
    for cells in rows(section(page(*full_study()), "Ablations")):
        changes[cells.get("what changes"), cells.get("architecture")] = cells

    def change(words):
        cells = changes[words, "`elita_gated`"]
        return cells["test loss"], cells["difference"]

    learned = "`mixer_options.attention2_gated.decay = learned`"
    assert change("nothing") == ("3.970", "+0.000")
    assert change(learned) == ("4.210", "+0.240")
    assert change("`feed_forward = swiglu`") == ("3.990", "+0.020")
    assert change("`mixers = [attention2_gated, gla, softmax]`") == ("3.960", "-0.010")
    assert changes["nothing", "`elita_query`"]["difference"] == "+0.150"


def test_gates_stand_beside_the_figures_of_the_paper(page):
    text = section(page(*full_study()), "Ablations")

    none, vector = row(text, "none"), row(text, "vector")
    assert (none["test loss"], none["paper's perplexity"]) == ("4.510", "23.21")
    assert (vector["test loss"], vector["paper's perplexity"]) == ("4.060", "14.77")


def test_options_are_kept_if_their_mean_improves(page):
    text = section(page(*full_study()), "Rates and options")

    warmup, muon = row(text, "`warmup_steps = 100`"), row(text, "`optimizer = muon`")
    assert (warmup["`elita_gated`"], warmup["`transformer`"]) == ("-0.020", "+0.010")
    assert (warmup["mean"], warmup["kept"]) == ("-0.005", "yes")
    assert (muon["mean"], muon["kept"]) == ("+0.010", "no")


@pytest.mark.parametrize("softmax, valid", [(0.97, "valid"), (0.9, "not shown to be valid")])
def test_recall(page, softmax, valid):
    text = section(
        page(
            recalled("softmax", 0.001, 0.95, 0.99),
            recalled("softmax", 0.01, 0.97, softmax),
            recalled("gated", 0.01, 0.5, 0.51),
            recalled("other", 0.01, 0.99, 0.98),
        ),
        "Recall",
    )

    assert row(text, "softmax")["rate"] == "0.01"  # by validation
    assert row(text, "softmax")["all"] == f"{softmax:.1%}"
    assert row(text, "gated")["16 pairs"] == "49.0%"
    assert f": {valid}." in text
    assert "Sizes: length = 64." in text
    assert row(text, "softmax")["of the rates"] == "0.001, 0.01"
    assert f"Below that are: {'gated' if softmax > 0.95 else 'gated, softmax'}." in text


def test_a_larger_size_has_its_own_seconds(page):
    larger = row(section(page(*full_study()), "A larger size"), "`elita_gated`")

    assert (larger["test loss"], larger["seconds a step"]) == ("3.350", "7.500")


def verdicts(text):
    """What is said of every target, by the beginning of its line."""
    lines = [line for line in text.split("\n") if line.startswith("- ")]
    return [line.rsplit(": ", 1)[1].split(" (")[0].strip("*.") for line in lines]


def test_targets_that_are_met(page):
    records = full_study()

    assert verdicts(page(*records)) == ["met", "missed", "met", "met", "met"]


def test_targets_that_are_missed(page):
    text = page(
        a_run(GATED, 3.95, 3.981, {"16384": 3.992}),
        a_run(FF2, 4.02, 4.02),
        a_run(TRANSFORMER, 4.0, 4.02),
        a_run(GATED, 3.7, 3.821, steps=1_000),
        timed(elita_gated=0.41, transformer=1.0),
    )

    assert verdicts(text) == ["missed", "met", "missed", "missed", "missed"]
    assert "**missed** (-0.039)" in text
    assert "**missed** (0.410)" in text


def test_no_records(page):
    text = page()

    assert [line for line in text.split("\n") if line.startswith("Not run yet")] == [
        "Not run yet: equal tokens, equal time, length, headline, ablations, recall, "
        "rates and options, a larger size."
    ]
    assert text.count("\n## ") == 2 and verdicts(text) == []
    assert "SHORT" not in text
    assert "nan" not in text and "None" not in text
    assert "![" not in text


@pytest.mark.parametrize("record", full_study(), ids=lambda x: x["kind"])
def test_any_record_alone(page, record):
    text = page(record)

    assert "nan" not in text and "None" not in text and "reaches -" not in text


def test_a_run_that_is_not_tested_yet(page):
    text = section(page(a_run(GATED, 3.95)), "Equal tokens")

    assert row(text, "`elita_gated`")["test loss"] == "-"
    assert "seconds a step" not in text and verdicts(text) == []


def test_a_short_study_says_so(page):
    text = page(
        a_run(GATED, 4.95, 5.0, steps=100),
        a_run(GATED, 4.9, 4.97, steps=263),
        a_run(GATED, 4.8, 4.85, steps=150),
        a_run(TRANSFORMER, 5.0, 5.1, steps=100),
        a_run(TRANSFORMER, 4.9, 4.95, steps=150),
    )

    assert "SHORT study (100 steps" in text
    assert row(section(text, "Equal tokens"), "`elita_gated`")["test loss"] == "5.000"
    assert row(section(text, "Equal time"), "`elita_gated`")["steps"] == "263"
    headline = [x for x in rows(section(text, "Headline")) if "steps" in x]
    assert [x["test loss"] for x in headline] == ["4.850", "4.950"]


def test_the_steps_of_the_table_are_the_most_frequent_ones(page):
    text = page(a_run(FF2, 5.0, 5.1, steps=300), *full_study())

    by_name = {x["architecture"]: x for x in reversed(rows(section(text, "Equal tokens")))}
    assert by_name["`gla_ff2`"]["test loss"] == "4.050"
    assert "300" in {cells["steps"] for cells in rows(section(text, "Equal time"))}


def test_the_same_files_give_the_same_bytes(tmp_path):
    def everything():
        paths = [path for path in (tmp_path / "docs").rglob("*") if path.is_file()]
        return {path.name: path.read_bytes() for path in paths}

    written(tmp_path, *full_study())
    first = everything()
    written(tmp_path, *full_study())

    assert len(first) == 5
    assert everything() == first
    assert str(tmp_path).encode() not in first["results.md"]


def test_a_plot_whose_runs_are_gone_is_removed(page, tmp_path):
    page(*full_study())
    for path in (tmp_path / "study").iterdir():
        path.unlink()

    assert "![" not in page()
    assert list((tmp_path / "docs" / "results").iterdir()) == []
