"""``train``: one run of one spec on one backend."""

import argparse
import os
from contextlib import closing

from triptych.core import cli, config
from triptych.core.launch import choose_backend, join, quiet
from triptych.core.machine.interrupts import leave_at_once
from triptych.core.machine.launchers import launched, once_per_machine
from triptych.core.training.run import default_output, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    cli.add_spec_arguments(parser)
    cli.add_backend_argument(parser)
    parser.add_argument(
        "--resume",
        type=os.path.expanduser,
        metavar="auto|PATH",
        help="go on from the newest whole checkpoint of --output, from this checkpoint or run, or "
        "from this file or folder of another system",
    )
    parser.add_argument(
        "--output", type=cli.path, metavar="DIR", help="default: runs/<recipe>-<backend>"
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains one run; returns 0, or 128 + n if signal n ended the run."""
    say = quiet if launched().rank else cli.say
    with once_per_machine():
        spec = config.load(arguments.config, arguments.overrides)
        changes = config.changes(arguments.config, arguments.overrides)
        say(f"spec: {arguments.config}" + (f" with {', '.join(changes)}" if changes else ""))
        backend = choose_backend(arguments.backend, spec, say)
        ranks = join(spec, backend)
    output = arguments.output or default_output(arguments.config, backend)
    # Before the first step a signal ends the process; after that it asks for a save.
    with leave_at_once(), closing(ranks):
        signal = train(spec, backend, output, resume=arguments.resume, say=say, ranks=ranks)
    return 128 + signal if signal else 0
