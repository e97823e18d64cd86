#!/usr/bin/env python3
"""`triptych convert` as a script; see `tools/convert.py --help`."""

import sys

from triptych.core.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
