"""``convert``: turns a file of weights of any system into that of another one."""

import argparse
import json
from contextlib import closing
from functools import partial

from triptych.core import cli
from triptych.core.errors import UserError, printable
from triptych.core.formats import destination
from triptych.core.formats.choice import PARTS
from triptych.core.formats.conversion import Check, Plan, Request, plan
from triptych.core.launch import REFERENCE
from triptych.core.machine.interrupts import leave_at_once
from triptych.core.report import conversion
from triptych.core.training.terminal import Terminal

POSITIONS = ("bicubic", "bicubic_antialias", "dino")
MEBI = 2**20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("source", nargs="?", type=cli.path, metavar="SRC", help="a file or folder")
    parser.add_argument("target", nargs="?", type=cli.path, metavar="DST", help="what to write")
    parser.add_argument("--from", dest="wanted", default="auto", metavar="auto|FORMAT",
                        help="format of SRC; default: auto")  # fmt: skip
    parser.add_argument("--to", metavar="FORMAT", help="format of DST; see --list")
    cli.add_spec_arguments(parser, required=False)
    cli.add_backend_argument(parser, REFERENCE, default=f"{REFERENCE}; it computes the self-check")
    parser.add_argument("--average", choices=("true", "false"),
                        help="whether to take averaged weights (EMA), if SRC has both")  # fmt: skip
    parser.add_argument("--branch", choices=("student", "teacher"), help="the encoder to take")
    parser.add_argument("--parts", default="", metavar="LIST",
                        help=f"what to convert: {','.join(PARTS)}; default: all")  # fmt: skip
    for name, text in (("missing", "canonical name of a tensor that SRC may lack"),
                       ("unused", "name in SRC of a tensor that DST may lack")):  # fmt: skip
        parser.add_argument(
            f"--allow-{name}",
            nargs="+",
            action="extend",
            default=[],
            metavar="NAME",
            help=f"{text}; NAME. stands for all that begin so",
        )
    parser.add_argument("--positions", choices=POSITIONS,
                        help="how to resample position tables for --image-size")  # fmt: skip
    parser.add_argument("--image-size", nargs="+", type=int, metavar="N",
                        help="of the wanted model: one number, or height and width")  # fmt: skip
    parser.add_argument("--channels", type=int, choices=range(1, 5), metavar="N",
                        help="of the wanted model: adapts its first layer")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace an earlier DST")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--list", action="store_true", help="show what each format holds")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table, checks the encoders, and writes."""
    if arguments.list:
        print(conversion.formats())
        return 0
    if not arguments.source or not arguments.to:
        raise UserError("convert: give SRC, DST and --to FORMAT, or --list")
    if not arguments.target and not arguments.dry_run:
        raise UserError("convert: DST is missing; give one, or --dry-run")
    if arguments.target:
        destination.check(arguments.target, arguments.source, force=arguments.force)
    # While a file is written, ``destination.write`` has handlers of its own.
    with leave_at_once():
        _convert(arguments)
    return 0


def _convert(arguments: argparse.Namespace) -> None:
    # With --json a program reads standard output, so messages go to standard error.
    say = partial(cli.say, errors=arguments.json)
    # Imported here, since the reference is slow to import, and no error before needs it.
    from triptych.core.formats.selfcheck import check

    made = plan(arguments.source, _request(arguments))
    checks = [] if made.problems else check(made, arguments.backend or REFERENCE)
    _show(arguments, made, checks)
    if made.problems:
        name = printable(str(arguments.source))
        raise UserError("\n".join(f"{name}: {problem}" for problem in made.problems))
    if arguments.dry_run:
        destination.examine(made)
        say("nothing written: --dry-run")
        return
    size = destination.total(arguments.target, made)
    with closing(Terminal(size, title="converting", shown=not arguments.json)) as terminal:
        container = destination.write(arguments.target, made, terminal.advance)
    say(f"{arguments.target}: {container}, {size / MEBI:.1f} MiB")


def _show(arguments: argparse.Namespace, made: Plan, checks: list[Check]) -> None:
    if arguments.json:
        print(json.dumps(conversion.as_json(made, checks), indent=1, allow_nan=False))
    else:
        print(conversion.text(made, checks))


def _request(arguments: argparse.Namespace) -> Request:
    parts = [part.strip() for part in arguments.parts.split(",") if part.strip()]
    if wrong := [part for part in parts if part not in PARTS]:
        raise UserError(f"--parts {wrong[0]}: expected {', '.join(PARTS)}")
    size = arguments.image_size
    if size is not None and len(size) > 2:
        raise UserError("--image-size: expected one number, or height and width")
    return Request(
        target=arguments.to,
        wanted=None if arguments.wanted == "auto" else arguments.wanted,
        recipe=arguments.config,
        overrides=arguments.overrides,
        average={"true": True, "false": False, None: None}[arguments.average],
        branch=arguments.branch,
        parts=parts,
        allow_missing=arguments.allow_missing,
        allow_unused=arguments.allow_unused,
        positions=arguments.positions,
        image_size=None if size is None else (size[0], size[-1]),
        channels=arguments.channels,
    )
