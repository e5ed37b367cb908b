"""The study of the README: python training/study.py --data_dir DIR. Again, it goes on."""

import sys

from elita_tf.runs import commands

if __name__ == "__main__":
    sys.exit(commands.main(["study", *sys.argv[1:]]))
