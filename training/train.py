"""Trains a recipe: python training/train.py --recipe quickstart. The same again goes on with it."""

import sys

from elita_tf.runs import commands

if __name__ == "__main__":
    sys.exit(commands.main(["train", *sys.argv[1:]]))
