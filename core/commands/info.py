"""``info``: prints a summary of a spec, this machine and its backends, or published weights."""

import argparse
import json
from typing import Any

from triptych.core import cli
from triptych.core.config import load, recipes
from triptych.core.errors import UserError
from triptych.core.machine import environment, launchers
from triptych.core.machine.interrupts import leave_at_once
from triptych.core.published import listing
from triptych.core.report.summary import render, summarize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``info env``, ``info weights`` or ``info -c FILE``; for all backends or for one."""
    parser.add_argument(
        "subject",
        nargs="?",
        choices=("env", "weights"),
        help="env: versions, and the usable backends; weights: published files that --weights and "
        "init.weights take by name",
    )
    cli.add_spec_arguments(parser, required=False)
    cli.add_backend_argument(parser, default="the spec's; with env, all")
    parser.add_argument(
        "--dataset-size", type=_size, metavar="N", help="training images, if the data is not here"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(arguments: argparse.Namespace) -> None:
    """Prints the report on stdout.

    Raises:
        UserError: neither a subject nor a spec is given, or the spec is wrong.
    """
    if (arguments.subject is None) == (arguments.config is None):
        raise UserError(
            f"info: give env, weights, or -c with a file or one of: {', '.join(recipes())}"
        )
    if arguments.subject == "env":
        report, text = _environment(arguments.backend)
    elif arguments.subject == "weights":
        report = listing.report()
        text = listing.render(report)
    else:
        named = [f"backend={arguments.backend}"] if arguments.backend else []
        spec = load(arguments.config, [*arguments.overrides, *named])
        report = summarize(spec, arguments.dataset_size)
        text = render(report)
    print(json.dumps(report, indent=2) if arguments.json else text)


def _environment(backend: str | None) -> tuple[dict[str, Any], str]:
    """The report on this machine, and on what a launcher has given to this process.

    Of several processes only the first reports the machine.
    """
    given = launchers.facts()
    report: dict[str, Any] = {}
    lines = []
    if given is None or given["rank"] == 0:
        with leave_at_once():
            report = environment.report((backend,) if backend else environment.NAMES)
        lines.append(environment.render(report))
    if given:
        report["launcher"] = given
        lines.append(launchers.render(given))
    return report, "\n".join(lines)


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of images > 0")
    return int(text)
