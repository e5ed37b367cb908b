"""Evaluates a trained run on a split: python training/evaluate.py --run_dir runs/quickstart."""

import sys

from elita_command import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
