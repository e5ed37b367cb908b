"""The installed command `elita`: one word for each thing that it does, and then its options."""

import argparse
import os
import signal
import sys
from importlib import import_module

import elita_tf

# The module of every word, whose `main` takes the options, and what `elita --help` says of it.
COMMANDS = {
    "train": ("training", "train a recipe, or go on with a run"),
    "evaluate": ("evaluation", "compute the loss of a run on a split of its corpus"),
    "generate": ("generation", "print a text of a run or a preset, token by token"),
    "export": ("exports", "write a run or a preset as a SavedModel, for LiteRT or for ONNX"),
    "recipes": ("recipe", "list the recipes of the package, or print one"),
    "study": ("study", "train and compare the architectures (hours)"),
    "publish": ("publish", "make a run a preset of the package (in a clone of its repository)"),
}
EXAMPLES = """
examples:
  elita train --recipe quickstart
  elita generate --run_dir runs/quickstart --prompt "The"
  elita generate --preset elita_wikitext2 --prompt "The"
  elita evaluate --run_dir runs/quickstart --split test
  elita export --run_dir runs/quickstart --format saved_model

`elita COMMAND --help` explains the options of a command. `--verbose` with any of them shows what
TensorFlow says when it starts.
"""
# What shells report of a process that ended because nobody read its output any more.
BROKEN_PIPE = 128 + 13


def main(arguments: list[str] | None = None) -> int:
    """Runs the command that the first argument names; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    command = _parser().parse_args(given[:1]).command
    # Until there is something to save: Python's own handler waits for the end of a compilation.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        # A text may hold characters that the terminal's encoding lacks: they are shown escaped.
        stream.reconfigure(errors="backslashreplace")
    try:
        status = import_module(f"elita_tf.runs.{COMMANDS[command][0]}").main(given[1:])
        sys.stdout.flush()
        return status or 0
    except BrokenPipeError:
        # Python would write what is left at its end, and complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:10} {does}" for name, (_, does) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="elita",
        usage="elita COMMAND [OPTIONS]",
        description="Trains, evaluates and exports language models of linear time.",
        epilog=f"commands:\n{commands}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"elita_tf {elita_tf.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser
