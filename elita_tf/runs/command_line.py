"""What the commands have in common: help, paths, and messages about mistakes."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tensorflow as tf

# What a user can have wrong, in an option, a file or the installation.
_EXPLAINED = (ImportError, OSError, ValueError, tf.errors.InvalidArgumentError)


def command_parser(name: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """The parser of `elita NAME`; its help ends with the examples."""
    return argparse.ArgumentParser(
        prog=f"elita {name}",
        description=description,
        epilog="\n".join(["examples:", *(f"  elita {name} {example}" for example in examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_source(parser: argparse.ArgumentParser) -> Any:
    """Adds `--run_dir` and `--preset`, one of which must be given; returns their group."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run_dir", type=path, help="a folder that `elita train` wrote")
    source.add_argument(
        "--preset",
        type=os.path.expanduser,
        help="elita_wikitext2, which is part of the package, a folder, or an address hf://...",
    )
    return source


def path(text: str) -> Path:
    """A path of the command line, where `~` is the user's own folder."""
    return Path(text).expanduser()


@contextmanager
def explained(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the process with a message and status 2 where the user has something wrong."""
    try:
        yield
    except BrokenPipeError:  # nobody reads the output: see `elita_tf.runs.commands`
        raise
    except _EXPLAINED as error:
        parser.error(str(error))
