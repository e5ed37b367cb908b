"""Trains a recipe: python training/train.py --recipe quickstart."""

import argparse
import itertools
import logging
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import devices
import keras
import run_folder
from assembly import Parts, assemble, load_run, load_trained
from evaluate import losses_by_position, report
from generate import SAMPLERS, live, stream
from recipe import Recipe, load_recipe

from elita_tf.callbacks import KeepWeights, LossPlot, StopOnSignal, TrainingLog
from elita_tf.data import unigram_entropy

SAMPLE_TOKENS = 120


def train(
    recipe: Recipe, parts: Parts, run_dir: Path, place: devices.Place = devices.ONE
) -> dict[str, Any]:
    """Trains and writes the run folder; returns the content of its `summary.json`."""
    started = time.perf_counter()
    model = parts.model
    entropy = unigram_entropy(parts.valid_ids, parts.tokenizer.vocabulary_size)
    run_folder.prepare(run_dir, recipe, parts.tokenizer)
    log = TrainingLog(recipe.batch_size * recipe.context_length, recipe.steps)
    weights = KeepWeights(run_dir)
    history = keras.callbacks.CSVLogger(run_dir / "metrics.csv")
    reference = ("unigram entropy of the validation text", entropy)
    plot = LossPlot(run_dir / "loss.png", f"{run_dir.name} ({recipe.corpus})", reference)
    stop = StopOnSignal()
    with place.scope():
        # An epoch of Keras is the steps between two validations.
        model.fit(
            parts.training,
            validation_data=parts.validation,
            steps_per_epoch=min(recipe.validation_interval, recipe.steps),
            epochs=math.ceil(recipe.steps / recipe.validation_interval),
            callbacks=[log, weights, history, plot, stop, keras.callbacks.TerminateOnNaN()],
            shuffle=False,
        )
    figures: dict[str, Any] = {}
    if not stop.received:
        # Anew, on one device.
        model = load_trained(run_dir, recipe, parts.tokenizer.vocabulary_size)
        losses = losses_by_position(
            model, parts.valid_ids, recipe.context_length, recipe.batch_size
        )
        figures = report(parts.corpus["valid"], *losses)
    summary = {
        "finished": bool(figures) and log.step == recipe.steps,
        "stopped_by": stop.received and stop.received.name,
        "steps": log.step,
        "validation_loss": figures.get("loss"),
        "validation_perplexity": figures.get("perplexity"),
        "validation_bits_per_byte": figures.get("bits_per_byte"),
        "validation_unigram_entropy": entropy,
        "train_unigram_entropy": unigram_entropy(parts.train_ids, parts.tokenizer.vocabulary_size),
        "parameters": model.count_params(),
        "tokens_per_second": log.tokens_per_second,
        "peak_memory_bytes": run_folder.peak_memory_bytes(),
        "wall_time_seconds": time.perf_counter() - started,
    }
    run_folder.write_json(run_dir / "summary.json", summary)
    return summary


def keep_for_use(run_dir: Path) -> None:
    """Writes what the run is for: `preset`, and a text in `sample.txt`."""
    model = load_run(run_dir)
    model.save_to_preset(str(run_dir / "preset"))
    sample = "".join(stream(live(model), "\n", SAMPLE_TOKENS, SAMPLERS["top_p"](0.8, 0)))
    (run_dir / "sample.txt").write_text(sample, encoding="utf-8")
    print(f"A sample of {SAMPLE_TOKENS} tokens: {sample}")


def main(arguments: list[str] | None = None) -> int:
    """Reads the command line, trains, prints; 1 after NaN, 128 + its number after a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="quickstart", help="name in training/recipes, or file")
    parser.add_argument("--data_dir", type=Path, help="folder with wiki.{train,valid,test}.raw")
    parser.add_argument("--run_dir", type=Path, help="default: runs/<recipe>")
    parser.add_argument("--devices", default="one", help="one, data, model=K or tpu: devices.py")
    parser.add_argument("--set", action="append", nargs="+", default=[], metavar="KEY=VALUE")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_dir = options.run_dir or Path("runs") / Path(options.recipe).stem
    try:
        recipe = load_recipe(options.recipe, itertools.chain.from_iterable(options.set))
        place = devices.find(options.devices, recipe)
        run_dir = place.folder(run_dir)
        with place.scope():
            parts = assemble(recipe, options.data_dir)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    summary = train(recipe, parts, run_dir, place)
    for key, value in summary.items():
        print(f"{key}: {value:,.4f}" if isinstance(value, float) else f"{key}: {value}")
    if summary["finished"]:
        keep_for_use(run_dir)
    print(f"Written to {run_dir}")
    if summary["stopped_by"]:
        return 128 + signal.Signals[summary["stopped_by"]]  # the custom of shells
    return 0 if summary["finished"] else 1


if __name__ == "__main__":
    sys.exit(main())
