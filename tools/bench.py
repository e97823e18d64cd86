#!/usr/bin/env python3
"""`triptych bench` as a script; see `tools/bench.py --help`."""

import sys

from triptych.core.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
