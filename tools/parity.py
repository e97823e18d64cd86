#!/usr/bin/env python3
"""`triptych parity` as a script; see `tools/parity.py --help`."""

import sys

from triptych.core.cli import main

if __name__ == "__main__":
    sys.exit(main(["parity", *sys.argv[1:]]))
