"""Training: the callbacks of a run, `fit`, its final figures, and the command `elita train`."""

import argparse
import importlib.util
import itertools
import logging
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import keras

from elita_tf import callbacks
from elita_tf.data import unigram_entropy
from elita_tf.models import ElitaCausalLM
from elita_tf.runs import devices, run_folder
from elita_tf.runs.assembly import (
    TrainingSetup,
    build_model,
    describe_batch,
    load_best_weights,
    text_model,
)
from elita_tf.runs.command_line import command_parser, explained, path
from elita_tf.runs.evaluation import losses_by_position, report
from elita_tf.runs.generation import ORIGINS, keep_for_use
from elita_tf.runs.recipe import Recipe, load_recipe
from elita_tf.runs.request import Mode, Request, opened

DEFAULT = "quickstart"
SECONDS_BETWEEN_LINES = 30


def train(
    recipe: Recipe,
    run_dir: Path | str,
    data_dir: Path | str | None = None,
    *,
    devices: str = "one",
    restart: bool = False,
    force: bool = False,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Trains a recipe in a folder, or goes on with the run that the folder holds.

    Args:
        recipe: see `load_recipe`.
        run_dir: absent, empty, or the folder of a run of this recipe.
        data_dir: with `wiki.train.raw`, `wiki.valid.raw` and `wiki.test.raw`, for WikiText.
        devices: "one", "data", "model=K" or "tpu"; see `elita_tf.runs.devices`.
        restart: begin anew, and delete what the run in the folder wrote.
        force: go on although the recipe or the text has changed.
        tensorboard: also write the figures for TensorBoard, to the folder `tensorboard`.

    Returns:
        The content of `summary.json`.

    Raises:
        ValueError, OSError, ImportError: for what a recipe or a folder can have wrong.
    """
    run_dir = Path(run_dir).expanduser()
    data_dir = None if data_dir is None else Path(data_dir).expanduser()
    if tensorboard:
        require_tensorboard()
    mode = Mode(restart=restart, force=force)
    with opened(recipe, run_dir, data_dir, devices, mode) as request:
        finished = request is None
        return run_folder.read_summary(run_dir) if finished else carry_out(request, tensorboard)


def require_tensorboard() -> None:
    """Raises ImportError without the package that writes the files of TensorBoard."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            "--tensorboard needs the package `tensorboard`, which is not installed: "
            "pip install 'elita_tf[tensorboard]'."
        )


class RunCallbacks(NamedTuple):
    """The callbacks of a run."""

    log: callbacks.TrainingLog
    health: callbacks.Health
    weights: callbacks.KeepWeights
    checkpoints: callbacks.Checkpoints
    stop: callbacks.StopOnSignal
    all: list[Any]


def make_callbacks(request: Request, tensorboard: bool = False) -> RunCallbacks:
    """What logs, checks, keeps and ends the run; a checkpoint holds the state of the first five."""
    run_dir, recipe, setup, checkpoint, _ = request
    log = callbacks.TrainingLog(recipe.batch_size * recipe.context_length, recipe.steps)
    health, weights = callbacks.Health(), callbacks.KeepWeights(run_dir)
    history = callbacks.MetricsFile(run_dir / "metrics.csv", resumed=checkpoint is not None)
    reference = ("unigram entropy of the validation text", entropy_of(setup, setup.valid_ids))
    plot = callbacks.LossPlot(run_dir / "loss.png", f"{run_dir.name} ({recipe.corpus})", reference)
    kept, stop = [log, health, weights, history, plot], callbacks.StopOnSignal()
    checkpoints = callbacks.Checkpoints(
        run_dir / "checkpoints",
        kept,
        seconds=recipe.checkpoint_seconds,
        metadata=run_folder.checkpoint_metadata(recipe, setup.train_ids),
        resumed=checkpoint,
        due=lambda: stop.received,
    )
    # Averages come last: what raises before a validation finds the weights of the training.
    averages = [callbacks.ValidateAverages()] if recipe.ema_momentum else []
    progress = [] if sys.stdout.isatty() else [ProgressLines(log)]
    every = [*kept, checkpoints, stop, *progress, *averages]
    if tensorboard:
        folder = run_dir / run_folder.TENSORBOARD
        every.append(keras.callbacks.TensorBoard(folder, write_graph=False))
    return RunCallbacks(log, health, weights, checkpoints, stop, every)


def entropy_of(setup: TrainingSetup, token_ids: Any) -> float:
    """What a model that knows how often each token comes would lose, in nats."""
    return unigram_entropy(token_ids, setup.tokenizer.vocabulary_size())


def fit(request: Request, callbacks: Iterable[Any]) -> None:
    """Trains the model from the beginning, or from the checkpoint."""
    recipe, setup, checkpoint = request.recipe, request.setup, request.checkpoint
    # An epoch of Keras is the steps between two validations.
    epoch_steps = min(recipe.validation_interval, recipe.steps)
    with request.devices.scope():
        setup.model.fit(
            setup.training,
            validation_data=setup.validation,
            steps_per_epoch=epoch_steps,
            initial_epoch=checkpoint.start_step // epoch_steps if checkpoint else 0,
            epochs=math.ceil(recipe.steps / epoch_steps),
            callbacks=list(callbacks),
            shuffle=False,
            verbose="auto" if sys.stdout.isatty() else 0,
        )


def trained_model(request: Request) -> ElitaCausalLM:
    """The model after training, with its best weights, on one device."""
    model = request.setup.model
    if request.devices != devices.ONE_DEVICE:
        model = build_model(request.recipe, request.setup.tokenizer.vocabulary_size())
    load_best_weights(model, request.run_dir)
    return model


def carry_out(request: Request, tensorboard: bool = False) -> dict[str, Any]:
    """Trains, writes what is made of the trained model, and returns what `summary.json` holds."""
    run_dir, recipe, setup, checkpoint, _ = request
    run_folder.prepare(run_dir, recipe, setup.tokenizer, checkpoint)
    used = make_callbacks(request, tensorboard)
    log, stop, figures, model = used.log, used.stop, {}, None
    try:
        fit(request, used.all)
        model = trained_model(request)
        sizes = recipe.context_length, recipe.batch_size
        losses = losses_by_position(model, setup.valid_ids, *sizes, documents=setup.valid_documents)
        figures = report(setup.corpus["valid"], *losses)
    except callbacks.Stopped as stopped:
        print(f"{stopped} The same command goes on after step {log.step}.")
        used.weights.save_last()
    except FloatingPointError as error:
        batch = describe_batch(recipe, setup.train_ids, log.step - 1)
        print(f"{error} Its batch: {batch}.")
        change = "" if recipe.on_nonfinite == "skip" else "on_nonfinite=skip or "
        change = f"--set {change}a lower learning_rate"
        if good := callbacks.newest_checkpoint(used.checkpoints.folder):
            print(f"--force goes on from the last checkpoint, {good.path}, with {change}.")
        else:
            print(f"There is no checkpoint yet: begin anew, with --restart and {change}.")
    finally:
        stop.release()
    summary = {
        "finished": bool(figures),
        "stopped_by": stop.received and stop.received.name,
        "steps": log.step,
        "skipped_steps": used.health.skipped_steps,
        **{f"validation_{k}": figures.get(k) for k in ("loss", "perplexity", "bits_per_byte")},
        "validation_unigram_entropy": entropy_of(setup, setup.valid_ids),
        "train_unigram_entropy": entropy_of(setup, setup.train_ids),
        "parameters": setup.model.backbone.count_params(),
        "tokens_per_second": log.tokens_per_second,
        "peak_memory_bytes": run_folder.peak_memory_bytes(),
        "wall_time_seconds": log.wall_time,
    }
    if figures:
        keep_for_use(
            run_dir,
            text_model(model, setup.tokenizer, recipe.context_length),
            setup.corpus["valid"],
            ORIGINS.get(recipe.corpus),
        )
    # Last, so that a run that is killed before it is not taken for finished.
    run_folder.record(run_dir, run_folder.SUMMARY)
    run_folder.write_json(run_dir / run_folder.SUMMARY, summary)
    return summary


def main(arguments: list[str] | None = None) -> int:
    """The command `elita train`.

    Returns:
        0; 1 after a loss that is not finite or a file that could not be written; 128 + its number
        after a signal. A mistake in the options ends the process with 2.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = _parser()
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        with explained(parser):
            if options.tensorboard:
                require_tensorboard()
            run_dir, recipe = _folder_and_recipe(options)
            mode = Mode(options.resume, options.restart, options.force)
            run = opened(recipe, run_dir, options.data_dir, options.devices, mode)
            request = stack.enter_context(run)
        if request is None:
            print(f"{run_dir} is finished. Train it anew with --restart, or choose a --run_dir.")
            return 0
        if request.checkpoint:
            step, path = request.checkpoint.step, request.checkpoint.path
            print(f"Going on after step {step} of {recipe.steps}: {path}")
        try:
            summary = carry_out(request, options.tensorboard)
        except BrokenPipeError:
            raise
        except OSError as error:
            print(f"elita train: error: {error}", file=sys.stderr)
            print("The same command goes on after the last checkpoint.", file=sys.stderr)
            return 1
    _show(request.run_dir, summary)
    if summary["stopped_by"]:
        return 128 + signal.Signals[summary["stopped_by"]]  # the custom of shells
    return 0 if summary["finished"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "train",
        "Trains a recipe in a run folder. The same command again goes on with the run.",
        "--recipe quickstart",
        "--recipe elita-wikitext2 --data_dir wikitext-2-raw --set steps=450 seed=1",
        "--resume --run_dir runs/quickstart",
    )
    parser.add_argument(
        "--recipe", help=f"a name that `elita recipes` lists, or a file; default: {DEFAULT}"
    )
    parser.add_argument("--data_dir", type=path, help="folder with wiki.{train,valid,test}.raw")
    parser.add_argument("--run_dir", type=path, help="folder to write; default: runs/<recipe>")
    parser.add_argument(
        "--devices", default="one", help="one (default), data, model=K or tpu: docs/guides/jax.md"
    )
    parser.add_argument(
        "--set",
        action="append",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="values in place of the recipe's; a key of a table is table.key",
    )
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument(
        "--resume", action="store_true", help="only go on, with the recipe of the run folder"
    )
    beginning.add_argument(
        "--restart", action="store_true", help="begin anew, and delete what the run wrote"
    )
    parser.add_argument(
        "--force", action="store_true", help="go on although the recipe or the text has changed"
    )
    parser.add_argument(
        "--tensorboard",
        action="store_true",
        help="also write the figures of every validation for TensorBoard, into the run folder",
    )
    return parser


def _folder_and_recipe(options: argparse.Namespace) -> tuple[Path, Recipe]:
    run_dir = options.run_dir or Path("runs") / Path(options.recipe or DEFAULT).stem
    own = str(run_dir / "recipe.toml") if options.resume else DEFAULT
    overrides = itertools.chain.from_iterable(options.set)
    return run_dir, load_recipe(options.recipe or own, overrides)


def _show(run_dir: Path, summary: dict[str, Any]) -> None:
    speed = summary["tokens_per_second"]
    print(
        f"\n{run_dir.name}: {summary['parameters']:,} parameters, {summary['steps']} steps in "
        f"{summary['wall_time_seconds']:.0f} s" + (f", {speed:,.0f} tokens/s." if speed else ".")
    )
    if not summary["finished"]:
        print(f"What there is so far is in {run_dir}.")
        return
    loss, guess = summary["validation_loss"], summary["validation_unigram_entropy"]
    print(
        f"Validation loss: {loss:.3f} nats per token (perplexity {math.exp(loss):.1f}, "
        f"{summary['validation_bits_per_byte']:.3f} bits per byte).\n"
        f"A guess that only knows how often each token comes would lose {guess:.3f} (perplexity "
        f"{math.exp(guess):.1f}).\n"
    )
    sample = run_dir / run_folder.SAMPLE
    if sample.is_file():
        print(
            "What the model writes after the first words, in brackets, of sentences of the "
            f"validation text:\n\n{sample.read_text(encoding='utf-8')}"
        )
    print(
        f"The losses are drawn in {run_dir / 'loss.png'}; all figures are in "
        f"{run_dir / run_folder.SUMMARY}.\n"
        f"To let it write more: elita generate --run_dir {shlex.quote(str(run_dir))} "
        '--prompt "The"'
    )


class ProgressLines(keras.callbacks.Callback):
    """Prints a line at every validation and twice a minute, for an output that is no terminal."""

    def __init__(self, log: callbacks.TrainingLog) -> None:
        super().__init__()
        self._log = log
        self._told_at = 0.0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._tell(f"Training {self._log.num_steps} steps; before the first the model is compiled")

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if time.monotonic() - self._told_at >= SECONDS_BETWEEN_LINES:
            self._tell_losses(logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._tell_losses(logs or {})

    def _tell_losses(self, logs: dict[str, Any]) -> None:
        log = self._log
        losses = ", ".join(f"{k} {logs[k]:.4f}" for k in ("loss", "val_loss") if k in logs)
        line = f"step {log.step} of {log.num_steps}: {losses}"
        if log.tokens_per_second:
            left = (log.num_steps - log.step) * log.tokens_per_step / log.tokens_per_second
            line += f", {log.tokens_per_second:,.0f} tokens/s, {left:.0f} s left"
        self._tell(line)

    def _tell(self, line: str) -> None:
        print(line, flush=True)
        self._told_at = time.monotonic()
