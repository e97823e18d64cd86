#!/usr/bin/env python3
"""`triptych eval` as a script; see `tools/eval.py --help`."""

import sys

from triptych.core.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
