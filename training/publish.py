"""Makes a run a preset of the package: python training/publish.py --run_dir DIR --data_dir DIR."""

import sys

from elita_command import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
