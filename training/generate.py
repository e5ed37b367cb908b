"""Prints a sample as it is made: python training/generate.py --run_dir runs/quickstart."""

import sys

from elita_command import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
