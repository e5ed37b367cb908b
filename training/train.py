"""Trains a recipe: python training/train.py --recipe quickstart. The same again goes on with it."""

import sys

from elita_command import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
