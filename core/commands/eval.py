"""``eval``: evaluates the features that given weights compute."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

from triptych.core import cli, config, formats
from triptych.core.data import few_levels
from triptych.core.errors import printable
from triptych.core.evaluation import PROTOCOLS
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import encoder
from triptych.core.launch import choose_backend, join, open_engine


class Option(NamedTuple):
    """A command line's option that stands for a key of the spec.

    Attributes:
        key: dotted name of the key.
        help: what the key means.
        choices: the values that the option takes; None: any.
        several: whether the option takes several values, which become a list.
    """

    key: str
    help: str
    choices: tuple[str, ...] | None = None
    several: bool = False


BRANCH = Option("evaluate.branch", "whose encoder", ("student", "teacher"))
TOKENS = ("cls", "mean")
OPTIONS = {
    "knn": {
        "branch": BRANCH,
        "tokens": Option("evaluate.tokens", "the feature of an image", TOKENS),
    },
    "lowshot": {
        "branch": BRANCH,
        "tokens": Option("evaluate.lowshot.tokens", "the feature of an image", TOKENS),
        "shots": Option("evaluate.lowshot.shots", "labelled images per class, e.g. 1,2,5,1%%"),
        "splits": Option("evaluate.lowshot.files", "files that name them", several=True),
    },
}
"""Protocol -> its options, by name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each evaluation."""
    choices = parser.add_subparsers(dest="evaluation", required=True, metavar="EVALUATION")
    for name, protocol in PROTOCOLS.items():
        text = protocol.summary
        _add_protocol(choices.add_parser(name, help=text, description=text), OPTIONS[name])


def _add_protocol(parser: argparse.ArgumentParser, options: dict[str, Option]) -> None:
    cli.add_spec_arguments(parser)
    cli.add_backend_argument(parser)
    parser.add_argument(
        "--weights",
        required=True,
        type=cli.path,
        metavar="PATH",
        help="a run or checkpoint folder, or an npz or safetensors file of a known format",
    )
    for name, option in options.items():
        parser.add_argument(
            f"--{name}",
            choices=option.choices,
            nargs="+" if option.several else None,
            metavar=None if option.choices else name.upper(),
            help=f"{option.help}; default: the spec's {option.key}",
        )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints one line, or one JSON object, for each row of the evaluation."""
    join()
    spec = config.load(arguments.config, [*arguments.overrides, *_overrides(arguments)])
    protocol = PROTOCOLS[arguments.evaluation]
    split = Split(spec)
    protocol.check(split)
    weights = formats.load_weights(arguments.weights, spec)
    step = int(weights.get("optimizer.step", 0))
    # With --json a program reads standard output, so messages go to standard error.
    say = partial(cli.say, errors=arguments.json)
    name = choose_backend(arguments.backend, spec, say)
    engine = open_engine(spec, name, weights)
    subject = encoder(engine, step, **asdict(protocol.choice(spec.evaluate)))
    rows = protocol.rows(split, subject)
    engine.close()
    for name in split.damaged():
        say(f"damaged, left out of the evaluation: {printable(name)}")
    for name, text in split.warnings():
        say(f"warning: {printable(name)}: {printable(text)}")
    if warning := few_levels(split.bank):
        say(f"warning: {warning}")
    if arguments.json:
        print(json.dumps([row.as_json() for row in rows], indent=1, allow_nan=False))
    else:
        for row in rows:
            print("\n  ".join([row.line(), *row.details()]))
    return 0


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """The options as overrides of the spec."""
    given = []
    for name, option in OPTIONS[arguments.evaluation].items():
        if value := getattr(arguments, name):
            listed = name == "shots" or option.several
            given.append(f"{option.key}={_list(value) if listed else value}")
    return given


def _list(value: str | Sequence[str]) -> str:
    """A comma-separated text, or several texts, as a list of YAML."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        return json.dumps([int(part) if part.isdecimal() else part for part in parts])
    return json.dumps(list(value))
