"""Prints a sample as it is made: python training/generate.py --run_dir runs/quickstart."""

import sys

from elita_tf.runs import commands

if __name__ == "__main__":
    sys.exit(commands.main(["generate", *sys.argv[1:]]))
