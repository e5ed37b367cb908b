"""The installed command `elita`: one word for each thing that it does, and then its options."""

import signal
import sys
from importlib import import_module

# The module of every word, whose `main` takes the options, and what `elita --help` says of it.
COMMANDS = {
    "train": ("training", "train a recipe, or go on with a run"),
    "evaluate": ("evaluation", "compute the losses of a run on a split of its corpus"),
    "generate": ("generation", "print a text, token by token, of a run or a preset"),
    "export": ("exports", "write a run or a preset as a SavedModel, for LiteRT or for ONNX"),
    "study": ("study", "train and compare what docs/results.md shows"),
    "publish": ("publish", "make a run a preset of the package (in a clone of the repository)"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command of the first argument with the others; returns the exit status."""
    name, *options = sys.argv[1:] if arguments is None else arguments
    # Until there is something to save: Python's own handler waits for the end of a compilation.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    module, _ = COMMANDS[name]
    return import_module(f"elita_tf.runs.{module}").main(options) or 0


if __name__ == "__main__":
    sys.exit(main())
