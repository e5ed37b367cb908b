"""What the command line of train.py asks for: a new run, or to go on with one."""

import argparse
import itertools
from pathlib import Path
from typing import NamedTuple

from elita_tf.callbacks import Checkpoint
from elita_tf.runs import devices, run_folder
from elita_tf.runs.assembly import Parts, assemble
from elita_tf.runs.recipe import Recipe, load_recipe

DEFAULT = "quickstart"


class Request(NamedTuple):
    """A run to begin, or, from its checkpoint, to go on with."""

    run_dir: Path
    recipe: Recipe
    parts: Parts
    checkpoint: Checkpoint | None
    place: devices.Place


def read_request(description: str, arguments: list[str] | None = None) -> Request | None:
    """Reads the command line; None when the run is finished already, which it prints.

    Raises:
        SystemExit: 2, after printing why, for what a command line, a recipe or a folder can have
            wrong.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--recipe", help=f"name of a recipe, or a file; default: {DEFAULT}")
    parser.add_argument("--data_dir", type=Path, help="folder with wiki.{train,valid,test}.raw")
    parser.add_argument("--run_dir", type=Path, help="default: runs/<recipe>")
    parser.add_argument("--devices", default="one", help="one, data, model=K or tpu: devices.py")
    parser.add_argument("--set", action="append", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--resume", action="store_true", help="begin nothing; the recipe is the run's own"
    )
    parser.add_argument("--restart", action="store_true", help="begin anew, deleting what is there")
    parser.add_argument("--force", action="store_true", help="go on with a changed recipe or text")
    options = parser.parse_args(arguments)
    try:
        return _find(options)
    except (ImportError, OSError, ValueError) as error:
        return parser.error(str(error))


def _find(options: argparse.Namespace) -> Request | None:
    run_dir = options.run_dir or Path("runs") / Path(options.recipe or DEFAULT).stem
    own = str(run_dir / "recipe.toml") if options.resume else DEFAULT
    overrides = itertools.chain.from_iterable(options.set)
    recipe = load_recipe(options.recipe or own, overrides)
    place, checkpoint = devices.find(options.devices, recipe), None
    run_dir = place.folder(run_dir)
    if not options.restart:
        checkpoint = run_folder.checkpoint_of(run_dir, recipe, options.force)
        if run_folder.is_finished(run_dir, recipe):
            print(f"{run_dir} is finished. Train it anew with --restart, or choose a --run_dir.")
            return None
    if options.resume and checkpoint is None:
        raise ValueError(f"--resume: {run_dir} holds no checkpoint to go on from.")
    with place.scope():
        parts = assemble(recipe, options.data_dir, checkpoint.start_step if checkpoint else 0)
    if checkpoint and not options.force:
        run_folder.require_same_text(checkpoint, parts.train_ids)
    if checkpoint:
        print(f"Going on after step {checkpoint.step} of {recipe.steps}: {checkpoint.path}")
    return Request(run_dir, recipe, parts, checkpoint, place)
