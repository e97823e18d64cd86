"""``results``: measures the rows of docs/results.md that are missing, and writes the page."""

import argparse
from pathlib import Path

from triptych.core import cli
from triptych.core.results import measure, page
from triptych.core.results.answers import Record
from triptych.core.results.table import tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--runs",
        type=cli.path,
        default=Path("runs") / "results",
        metavar="DIR",
        help="folder of the runs",
    )
    parser.add_argument(
        "--page",
        type=cli.path,
        default=Path("docs") / "results.md",
        metavar="FILE",
        help="the page; a file *.json beside it keeps what is measured, and that is not repeated",
    )
    parser.add_argument(
        "--write-only", action="store_true", help="measure nothing; write what is there"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measures and writes.

    Raises:
        UserError: as in ``core.results.measure.measure``, or what was measured is damaged.
    """
    rows, record = tables(arguments.runs), Record(arguments.page.with_suffix(".json"))
    if arguments.write_only:
        page.write(rows, record, arguments.page)
    else:
        measure.measure(rows, record, arguments.page, cli.say)
    cli.say(f"wrote {arguments.page}")
