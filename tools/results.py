#!/usr/bin/env python3
"""`triptych results` as a script; see `tools/results.py --help`."""

import sys

from triptych.core.cli import main

if __name__ == "__main__":
    sys.exit(main(["results", *sys.argv[1:]]))
