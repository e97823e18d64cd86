#!/usr/bin/env python3
"""`triptych info` as a script; see `tools/info.py --help`."""

import sys

from triptych.core.cli import main

if __name__ == "__main__":
    sys.exit(main(["info", *sys.argv[1:]]))
