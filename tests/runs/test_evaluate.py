import json
import math
import shutil

import numpy as np
import pytest

from elita_tf.data import Split, load_corpus, load_tokenizer
from elita_tf.runs import evaluation as script
from elita_tf.runs.assembly import build_model
from elita_tf.runs.recipe import load_recipe


@pytest.fixture(scope="module")
def evaluated(run_dir, tmp_path_factory):
    """A copy of the run folder to write to."""
    return shutil.copytree(run_dir, tmp_path_factory.mktemp("evaluated") / "tiny")


def oracle(run_dir, split, context):
    """Losses of every id but the first, window by window, from the logits in float64."""
    recipe = load_recipe(str(run_dir / "recipe.toml"))
    tokenizer = load_tokenizer(run_dir / "tokenizer")
    model = build_model(recipe, tokenizer.vocabulary_size())
    model.load_weights(run_dir / "best.weights.h5")
    ids = tokenizer.encode("".join(load_corpus(recipe.corpus)[split].lines()))
    losses = []
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        logits = np.float64(model({"token_ids": window[None, :-1]})[0])
        log_sums = np.log(np.sum(np.exp(logits), axis=-1))
        losses.append(log_sums - logits[np.arange(len(window) - 1), window[1:]])
    return losses


@pytest.mark.long
@pytest.mark.parametrize(("split", "context"), [("test", None), ("valid", 40), ("test", 7)])
def test_figures_agree_with_the_logits(evaluated, split, context):
    arguments = ["--run_dir", str(evaluated), "--split", split]
    script.main(arguments + (["--context", str(context)] if context else []))
    windows = f"-{context}" if context else ""
    figures = json.loads((evaluated / f"evaluation-{split}{windows}.json").read_text())
    losses = oracle(evaluated, split, context or 16)
    total, tokens = sum(map(np.sum, losses)), sum(map(len, losses))
    text = load_corpus(load_recipe(str(evaluated / "recipe.toml")).corpus)[split]
    raw = b"".join(text.byte_lines())
    words = len(raw.split()) + raw.count(b"\n")
    assert (figures["tokens"], figures["words"], figures["bytes"]) == (tokens, words, len(raw))
    assert figures["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert figures["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / len(raw), rel=1e-5)
    third = [loss for window in losses for loss in window[2:4]]
    bucket = figures["loss_by_position"][2]
    assert (bucket["start"], bucket["stop"]) == (2, 4)
    assert bucket["loss"] == pytest.approx(np.mean(third), rel=1e-5)


def test_one_stream_is_one_long_window(evaluated):
    """With the state carried, the windows do not matter, but for the float32 of the sums."""
    script.main(["--run_dir", str(evaluated), "--carry_state", "--context", "24"])
    figures = json.loads((evaluated / "evaluation-test-24-carried.json").read_text())
    (losses,) = oracle(evaluated, "test", figures["tokens"])
    assert figures["carry_state"] is True and len(losses) == figures["tokens"]
    assert figures["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_table_for_people_beside_the_json(evaluated, capsys):
    script.main(["--run_dir", str(evaluated), "--split", "valid", "--context", "1000"])
    shown = capsys.readouterr()
    figures = json.loads(shown.out)
    lines = shown.err.splitlines()
    rows = [line.rsplit(maxsplit=1) for line in lines[lines.index("") :] if line[:1].isdigit()]
    buckets = figures["loss_by_position"]
    assert [row[1] for row in rows] == [f"{bucket['loss']:.4f}" for bucket in buckets]
    assert [row[0].strip() for row in rows[:4]] == ["0", "1", "2 to 3", "4 to 7"]
    assert f"{'loss':15} {figures['loss']:8.4f}  nats per token" in lines
    assert (
        f"windows of 1,000 tokens, weights of best.weights.h5: {figures['tokens']:,}" in shown.err
    )


def test_buckets_cover_every_position_once():
    sums, counts = np.arange(1.0, 12), np.full(11, 2.0)
    buckets = script.bucket_losses(sums, counts)
    assert [(b["start"], b["stop"]) for b in buckets] == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 11)]
    assert [b["loss"] for b in buckets] == [0.5, 1.0, 7 / 4, 26 / 8, 30 / 6]
    assert len(script.bucket_losses(np.ones(1), np.ones(1))) == 1
    assert script.bucket_losses(np.ones(8), np.ones(8))[-1]["stop"] == 8
    assert script.bucket_losses(np.zeros(4), np.array([1.0, 1, 0, 0]))[-1]["stop"] == 2


def test_report_by_hand(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ab c\nd\n")
    figures = script.report(Split(path), np.array([2.0, 4.0]), np.array([2.0, 1.0]))
    assert figures["loss"] == 2.0
    assert figures["perplexity"] == pytest.approx(math.exp(2))
    assert figures["word_perplexity"] == pytest.approx(math.exp(6 / 5))
    assert figures["bits_per_byte"] == pytest.approx(6 / math.log(2) / 7)
    assert (figures["tokens"], figures["words"], figures["bytes"]) == (3, 5, 7)
    assert script.report(Split(path), np.array([1e6]), np.array([1.0]))["perplexity"] == math.inf


def test_a_run_without_validation_uses_its_last_weights(run_dir, tmp_path, capsys):
    for name in ("recipe.toml", "last.weights.h5"):
        (tmp_path / name).write_bytes((run_dir / name).read_bytes())
    load_tokenizer(run_dir / "tokenizer").save(tmp_path / "tokenizer")
    script.main(["--run_dir", str(tmp_path)])
    assert json.loads((tmp_path / "evaluation-test.json").read_text())["weights"] == (
        "last.weights.h5"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run_dir", "/nowhere"], "nowhere"),
        (["--split", "dev"], "dev"),
        (["--context", "0"], "0"),
    ],
)
def test_mistakes_stop(evaluated, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--run_dir", str(evaluated), *arguments])
    assert message in capsys.readouterr().err
