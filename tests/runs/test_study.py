"""The study's plan: what it trains, how it chooses, and that what is done is not done again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from elita_tf.runs import study
from elita_tf.runs.assembly import build_model
from elita_tf.runs.recipe import load_recipe


@pytest.fixture
def make_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A study that trains nothing: its validation losses come from a function of the recipe."""

    def make(loss: Any, **changes: Any) -> study.Study:
        plan = dataclasses.replace(
            study.FULL, folder=tmp_path, page=tmp_path / "page.md", **changes
        )
        made = study.Study(plan, tmp_path, tmp_path / "runs")
        made.trained = []

        def train(folder_run: study.Run, folder: Path) -> None:
            made.trained.append(folder_run.name)

        def record(run: study.Run, folder: Path) -> dict[str, Any]:
            recipe = run.resolved()
            values = dataclasses.asdict(recipe)
            return {"recipe": values, "validation": {"loss": loss(recipe)}, "test": {}}

        monkeypatch.setattr(made, "_train_in_a_process", train)
        monkeypatch.setattr(study, "training_record", record)
        monkeypatch.setattr(study.results, "write_page", lambda *_: None)
        return made

    return make


def distance(best: float):
    """A loss that is lowest at a rate."""
    return lambda recipe: abs(recipe.learning_rate - best)


def test_the_best_rate_is_that_of_the_lowest_validation_loss(make_study) -> None:
    made = make_study(distance(12e-3))
    assert made.best_rate("gla") == 12e-3
    assert made.tried_rates() == [3e-3, 6e-3, 12e-3, 24e-3]


@pytest.mark.parametrize(("best", "added"), [(1e-3, 1.5e-3), (1.0, 48e-3)])
def test_a_best_rate_at_an_end_adds_one_step_for_all(make_study, best, added) -> None:
    made = make_study(distance(best), architectures=("gla", "transformer"))
    assert sorted({*made.tried_rates()} - {*study.FULL.rates}) == [added]
    assert made.best_rate("gla") == made.best_rate("transformer") == added


def test_what_is_done_is_not_done_again(make_study) -> None:
    made = make_study(distance(6e-3))
    made.best_rate("gla")
    first = list(made.trained)
    assert len(first) == len(set(first)) > 0
    made.best_rate("gla")
    assert made.trained == first
    assert json.loads((made.plan.folder / f"{first[0]}.json").read_text())["test"] == {}


def test_a_record_of_another_recipe_is_refused(make_study) -> None:
    made = make_study(distance(6e-3))
    run = made.tuned("gla", 6e-3)
    record = made.train(run)
    record["recipe"]["warmup_steps"] = 7
    made.write(run.name, record)
    with pytest.raises(ValueError, match=r"another recipe \(warmup_steps: 7 -> 30\). Move it away"):
        made.train(run)


def test_equal_time_is_as_many_steps_as_fit(make_study) -> None:
    made = make_study(distance(6e-3))
    figures = {"transformer": (1.0, 3.0, 2.0), "elita_gated": (0.5, 0.4, 0.6), "gla": (4.0,) * 3}
    rounds = [
        {name: {"seconds_per_step": each[turn]} for name, each in figures.items()}
        for turn in range(3)
    ]
    made.write("timing", {"kind": "timing", "rounds": rounds})
    run = made.in_equal_time("elita_gated", seed=1)
    assert run.resolved().steps == 1800 and run.resolved().seed == 1
    assert made.in_equal_time("gla", seed=0).resolved().steps == 225


def test_a_stopped_timing_goes_on_with_whole_rounds(make_study, monkeypatch) -> None:
    made, timed = make_study(distance(6e-3)), []
    size = len(made.plan.architectures)

    def one(name: str, turn: int) -> dict[str, float]:
        if len(timed) == 2 * size - 1:
            raise KeyboardInterrupt
        timed.append((turn, name))
        return {"seconds_per_step": float(len(timed))}

    monkeypatch.setattr(made, "_timed", one)
    with pytest.raises(KeyboardInterrupt):
        made.timing()
    assert len(made.record("timing")["rounds"]) == 1
    timed.clear()
    made.plan = dataclasses.replace(made.plan, timing_rounds=2)
    made.timing()
    assert timed == [(1, name) for name in made.plan.architectures]
    assert [sorted(x) for x in made.record("timing")["rounds"]] == [
        sorted(made.plan.architectures)
    ] * 2


def test_a_timing_begins_anew(make_study, monkeypatch) -> None:
    made, calls = make_study(distance(6e-3)), []
    monkeypatch.setattr(made, "_train_in_a_process", lambda *given: calls.append(given[1:]))
    monkeypatch.setattr(study, "cost", lambda _, folder: {"seconds_per_step": folder.name})
    assert made._timed("gla", 2) == {"seconds_per_step": "timing-2-gla"}
    assert calls == [(made.runs / "timing-2-gla", "--restart")]


def test_the_tuned_recipes_are_one_but_for_architecture_and_rate() -> None:
    recipes = [
        load_recipe(f"{name.replace('_', '-')}-wikitext2-tuned")
        for name in study.FULL.architectures
    ]
    assert [recipe.architecture for recipe in recipes] == list(study.FULL.architectures)
    for recipe in recipes[1:]:
        differing = {line.split(":")[0] for line in recipes[0].differences(recipe)}
        assert differing <= {"architecture", "num_heads", "learning_rate"}


@pytest.mark.parametrize("changes", study.ABLATIONS.values(), ids=study.ABLATIONS)
def test_every_ablation_changes_the_model(make_study, changes: tuple) -> None:
    architecture, overrides = changes
    made = make_study(distance(6e-3))
    run = made.tuned(architecture, 6e-3, *overrides)
    model = build_model(run.resolved(), 2048)
    assert not set(run.name) & set('/\\:*?"<>| ')
    usual = build_model(made.tuned("elita_gated", 6e-3).resolved(), 2048)
    assert model.backbone.get_config() != usual.backbone.get_config()
    assert 240_000 < model.count_params() <= 300_000


def test_the_record_of_a_run_and_its_test_figures(run_dir: Path, tiny_recipe: Path) -> None:
    record = study.training_record(study.Run(str(tiny_recipe), ()), run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert record["validation"]["loss"] == summary["validation_loss"]
    assert record["losses"]["step"] == [2, 4, 5]
    assert len(record["losses"]["val_loss"]) == 3
    assert record["seconds_per_step"] * summary["tokens_per_second"] == pytest.approx(64)
    json.dumps(record)


@pytest.mark.long
def test_late_losses_are_of_the_same_labels_at_every_length(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "LATE", 8)
    figures = {x: study.test_figures(run_dir, Path(), x) for x in (16, 64, study.CARRIED)}
    assert figures[16]["tokens"] == figures[64]["tokens"] == figures[study.CARRIED]["tokens"]
    # At the training length the late positions are all those from 8 on.
    buckets = {x["start"]: x["loss"] for x in figures[16]["loss_by_position"]}
    assert figures[16]["late_loss"] == pytest.approx(buckets[8], rel=1e-2)
    assert figures[16]["late_loss"] != figures[16]["loss"]


RECORDS = sorted((Path(__file__).parents[2] / "docs" / "study").glob("*,*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=[path.stem[-60:] for path in RECORDS])
def test_the_records_that_exist_are_of_the_recipes_as_they_are(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["kind"] != "run":
        pytest.skip("not of a recipe")
    plan = dataclasses.replace(study.FULL, folder=path.parent, page=tmp_path / "page.md")
    made = study.Study(plan, tmp_path, tmp_path / "runs")
    monkeypatch.setattr(made, "_train_in_a_process", lambda *_: pytest.fail("trained again"))
    run = study.Run(record["recipe_name"], tuple(record["overrides"]))
    assert run.name == path.stem
    assert made.train(run) == record


def test_there_are_records() -> None:
    assert len(RECORDS) >= 2


def test_a_page_of_another_is_not_replaced(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text("my own results")
    with pytest.raises(ValueError, match="is not the page of a study"):
        study.results.write_page(tmp_path / "study", page)
    assert [path.name for path in tmp_path.iterdir()] == ["results.md"]
    page.unlink()
    for _ in range(2):
        study.results.write_page(tmp_path / "study", page)
