"""Exports a run: python training/export.py --run_dir runs/quickstart --format saved_model."""

import sys

from elita_command import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
