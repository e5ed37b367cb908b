"""The study of the README: python training/study.py --data_dir DIR. Again, it goes on."""

import sys

from elita_command import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
