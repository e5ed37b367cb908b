"""Exports a run: python training/export.py --run_dir runs/quickstart --format saved_model."""

import sys

from elita_tf.runs import commands

if __name__ == "__main__":
    sys.exit(commands.main(["export", *sys.argv[1:]]))
