#!/usr/bin/env python3
"""`triptych report` as a script; see `tools/report.py --help`."""

import sys

from triptych.core.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
