"""``eval``: what the features of some weights are worth."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from triptych import backends
from triptych.core import config, formats
from triptych.core.cli import add_backend_argument, add_spec_arguments
from triptych.core.evaluation.protocol import KnnProtocol
from triptych.core.training.run import choose_backend
from triptych.core.training.terminal import evaluation_line

HELP = "evaluate frozen features"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("evaluation", choices=("knn",), help="knn: weighted nearest neighbours")
    add_spec_arguments(parser)
    add_backend_argument(parser)
    parser.add_argument(
        "--weights",
        required=True,
        type=Path,
        metavar="PATH",
        help="a run or checkpoint folder, or an npz or safetensors file of a known format",
    )
    for name, choices in (("branch", ("student", "teacher")), ("tokens", ("cls", "mean"))):
        text = f"default: the spec's evaluate.{name}"
        parser.add_argument(f"--{name}", choices=choices, help=text)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints one line, or one JSON object, for each number of labels."""
    spec = config.load(arguments.config, arguments.overrides)
    protocol = KnnProtocol(spec)
    weights = formats.load_weights(arguments.weights, spec)
    step = int(weights.get("optimizer.step", 0))
    # With --json, standard output is for a program.
    say = partial(print, file=sys.stderr) if arguments.json else print
    name = choose_backend(arguments.backend, spec, say)
    model = {n: array for n, array in weights.items() if not n.startswith("optimizer.")}
    engine = backends.load(name).build(spec, model)
    branch = arguments.branch or spec.evaluate.branch
    tokens = arguments.tokens or spec.evaluate.tokens
    rows = protocol.engine(engine, step, branch=branch, tokens=tokens)
    engine.close()
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(evaluation_line(row) for row in rows))
    return 0
