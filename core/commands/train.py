"""``train``: one run of one spec on one backend."""

import argparse
from pathlib import Path

from triptych.core import config
from triptych.core.cli import add_backend_argument, add_spec_arguments
from triptych.core.training.run import choose_backend, default_output, train

HELP = "train one spec on one backend"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_spec_arguments(parser)
    add_backend_argument(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="go on from the newest whole checkpoint of --output, or from this checkpoint or run",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="default: runs/<recipe>-<backend>"
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains; 0, or 128 + n when signal n ended the run."""
    spec = config.load(arguments.config, arguments.overrides)
    backend = choose_backend(arguments.backend, spec)
    output = arguments.output or default_output(arguments.config, backend)
    signal = train(spec, backend, output, resume=arguments.resume)
    return 128 + signal if signal else 0
