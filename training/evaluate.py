"""Evaluates a trained run on a split: python training/evaluate.py --run_dir runs/quickstart."""

import sys

from elita_tf.runs import commands

if __name__ == "__main__":
    sys.exit(commands.main(["evaluate", *sys.argv[1:]]))
