#!/usr/bin/env python3
"""`triptych train` as a script; see `tools/train.py --help`."""

import sys

from triptych.core.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
