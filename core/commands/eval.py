"""``eval``: evaluates the features that given weights compute."""

import argparse
import json
from functools import partial

from triptych.core import cli, config, formats
from triptych.core.data import few_levels
from triptych.core.errors import printable
from triptych.core.evaluation import PROTOCOLS
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.subject import encoder
from triptych.core.launch import choose_backend, join, open_engine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    summaries = "; ".join(f"{name}: {protocol.summary}" for name, protocol in PROTOCOLS.items())
    parser.add_argument("evaluation", choices=PROTOCOLS, help=summaries)
    cli.add_spec_arguments(parser)
    cli.add_backend_argument(parser)
    parser.add_argument(
        "--weights",
        required=True,
        type=cli.path,
        metavar="PATH",
        help="a run or checkpoint folder, or an npz or safetensors file of a known format",
    )
    for name, choices in (("branch", ("student", "teacher")), ("tokens", ("cls", "mean"))):
        text = f"default: the spec's evaluate.{name}"
        parser.add_argument(f"--{name}", choices=choices, help=text)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints one line, or one JSON object, for each row of the evaluation."""
    join()
    spec = config.load(arguments.config, arguments.overrides)
    split = Split(spec)
    weights = formats.load_weights(arguments.weights, spec)
    step = int(weights.get("optimizer.step", 0))
    # With --json a program reads standard output, so messages go to standard error.
    say = partial(cli.say, errors=arguments.json)
    name = choose_backend(arguments.backend, spec, say)
    engine = open_engine(spec, name, weights)
    branch = arguments.branch or spec.evaluate.branch
    tokens = arguments.tokens or spec.evaluate.tokens
    subject = encoder(engine, step, branch=branch, tokens=tokens)
    rows = PROTOCOLS[arguments.evaluation].rows(split, subject)
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
        print("\n".join(row.line() for row in rows))
    return 0
