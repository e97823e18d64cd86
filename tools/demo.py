#!/usr/bin/env python3
"""`triptych demo` as a script; see `tools/demo.py --help`."""

import sys

from triptych.core.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
