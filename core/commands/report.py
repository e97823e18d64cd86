"""``report``: one HTML page about some runs."""

import argparse
import os
from pathlib import Path

from triptych.core import cli
from triptych.core.report import page
from triptych.core.runs.record import read_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("runs", nargs="+", type=cli.path, metavar="RUN_DIR", help="folders of runs")
    parser.add_argument(
        "-o",
        "--output",
        type=cli.path,
        metavar="FILE",
        help="default: report.html in the run's folder, or in the one that holds all the runs",
    )
    parser.add_argument(
        "--picture", type=cli.path, metavar="FILE", help="also write the loss curves as an SVG file"
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the page and says where.

    Raises:
        UserError: a folder holds no run, a file in it is damaged, or the page cannot be written.
    """
    records = [read_run(path) for path in arguments.runs]
    output = arguments.output
    if output is None:
        shared = os.path.commonpath([os.path.abspath(path) for path in arguments.runs])
        output = Path(os.path.relpath(shared)) / "report.html"
    page.write(records, output)
    cli.say(f"wrote {output}")
    if arguments.picture:
        page.write_picture(records, arguments.picture)
        cli.say(f"wrote {arguments.picture}")
