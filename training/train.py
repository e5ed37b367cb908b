"""Trains a recipe: python training/train.py --recipe quickstart. The same again goes on with it."""

import logging
import math
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import devices
import run_folder
from assembly import Parts, describe_batch, load_trained
from evaluate import losses_by_position, report
from generate import keep_for_use
from recipe import Recipe
from request import read_request

from elita_tf import callbacks
from elita_tf.data import unigram_entropy


class Watch(NamedTuple):
    """The callbacks of a run."""

    log: callbacks.TrainingLog
    health: callbacks.Health
    weights: callbacks.KeepWeights
    checkpoints: callbacks.Checkpoints
    stop: callbacks.StopOnSignal
    all: list[Any]


def watch(
    run_dir: Path, recipe: Recipe, parts: Parts, checkpoint: callbacks.Checkpoint | None
) -> Watch:
    """What logs, judges, keeps and ends the run; a checkpoint holds the state of the first five."""
    log = callbacks.TrainingLog(recipe.batch_size * recipe.context_length, recipe.steps)
    health, weights = callbacks.Health(), callbacks.KeepWeights(run_dir)
    history = callbacks.MetricsFile(run_dir / "metrics.csv", resumed=checkpoint is not None)
    reference = ("unigram entropy of the validation text", entropy_of(parts, parts.valid_ids))
    plot = callbacks.LossPlot(run_dir / "loss.png", f"{run_dir.name} ({recipe.corpus})", reference)
    kept, stop = [log, health, weights, history, plot], callbacks.StopOnSignal()
    checkpoints = callbacks.Checkpoints(
        run_dir / "checkpoints",
        kept,
        seconds=recipe.checkpoint_seconds,
        metadata=run_folder.notes(recipe, parts.train_ids),
        resumed=checkpoint,
        due=lambda: stop.received,
    )
    return Watch(log, health, weights, checkpoints, stop, [*kept, checkpoints, stop])


def entropy_of(parts: Parts, token_ids: Any) -> float:
    """What a model that knows how often each token comes would lose, in nats."""
    return unigram_entropy(token_ids, parts.tokenizer.vocabulary_size())


def fit(
    recipe: Recipe,
    parts: Parts,
    checkpoint: callbacks.Checkpoint | None,
    place: devices.Place,
    watched: Watch,
) -> None:
    """Trains the model from the beginning, or from the checkpoint."""
    # An epoch of Keras is the steps between two validations.
    epoch_steps = min(recipe.validation_interval, recipe.steps)
    with place.scope():
        parts.model.fit(
            parts.training,
            validation_data=parts.validation,
            steps_per_epoch=epoch_steps,
            initial_epoch=checkpoint.start_step // epoch_steps if checkpoint else 0,
            epochs=math.ceil(recipe.steps / epoch_steps),
            callbacks=watched.all,
            shuffle=False,
        )


def train(
    run_dir: Path,
    recipe: Recipe,
    parts: Parts,
    checkpoint: callbacks.Checkpoint | None,
    place: devices.Place = devices.ONE,
) -> dict[str, Any]:
    """Trains, or goes on from a checkpoint; returns the content of `summary.json`."""
    run_folder.prepare(run_dir, recipe, parts.tokenizer, checkpoint)
    watched = watch(run_dir, recipe, parts, checkpoint)
    log, stop, figures = watched.log, watched.stop, {}
    try:
        fit(recipe, parts, checkpoint, place, watched)
        # Anew, as validation takes one device.
        model = load_trained(run_dir, recipe, parts.tokenizer.vocabulary_size())
        sizes = recipe.context_length, recipe.batch_size
        losses = losses_by_position(model, parts.valid_ids, *sizes, documents=parts.valid_documents)
        figures = report(parts.corpus["valid"], *losses)
    except callbacks.Stopped as stopped:
        print(f"{stopped} The same command goes on after step {log.step}.")
        watched.weights.save_last()
    except FloatingPointError as error:
        batch = describe_batch(recipe, parts.train_ids, log.step - 1)
        good = callbacks.newest_checkpoint(watched.checkpoints.folder)
        print(f"{error} Its batch: {batch}. Last good checkpoint: {good and good.path}.")
        print("--force goes on from there, with --set on_nonfinite=skip or a lower learning_rate.")
    finally:
        stop.release()
    return {
        "finished": bool(figures),
        "stopped_by": stop.received and stop.received.name,
        "steps": log.step,
        "skipped_steps": watched.health.skipped_steps,
        **{f"validation_{k}": figures.get(k) for k in ("loss", "perplexity", "bits_per_byte")},
        "validation_unigram_entropy": entropy_of(parts, parts.valid_ids),
        "train_unigram_entropy": entropy_of(parts, parts.train_ids),
        "parameters": parts.model.count_params(),
        "tokens_per_second": log.tokens_per_second,
        "peak_memory_bytes": run_folder.peak_memory_bytes(),
        "wall_time_seconds": log.wall_time,
    }


def main(arguments: list[str] | None = None) -> int:
    """Trains; 1 after what is not finite, 2 after a mistake, 128 + its number after a signal."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    request = read_request(__doc__, arguments)
    if request is None:
        return 0
    summary = train(*request)
    for key, value in summary.items():
        print(f"{key}: {value:,.4f}" if isinstance(value, float) else f"{key}: {value}")
    if summary["finished"]:
        keep_for_use(request.run_dir)
    # Last, so that a run that is killed before it is not taken for finished.
    run_folder.write_json(request.run_dir / "summary.json", summary)
    print(f"Written to {request.run_dir}")
    if summary["stopped_by"]:
        return 128 + signal.Signals[summary["stopped_by"]]  # the custom of shells
    return 0 if summary["finished"] else 1


if __name__ == "__main__":
    # Until there is something to save: Python's own handler waits for the end of a compilation.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(main())
