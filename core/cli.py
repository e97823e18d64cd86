"""The command line of ``triptych`` and ``tools/``: it runs one command and returns a status."""

import argparse
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from triptych.core.errors import NonFiniteError, UserError, printable
from triptych.core.machine.blas import choose_kernels
from triptych.core.machine.interrupts import leave_at_once
from triptych.core.machine.launchers import once_per_machine
from triptych.core.machine.signals import held_back

COMMANDS = {
    "train": "train one spec on one backend",
    "eval": "evaluate frozen features",
    "convert": "turn weights of any system into those of another one",
    "parity": "record a run's numbers, compare two records, or train on every backend",
    "info": "show parameters, FLOPs, schedule and resolved spec of a run; or the environment",
    "bench": "measure a training step, or the loader, beside a plain alternative in the same run",
    "report": "write one self-contained HTML page about some runs",
    "results": "measure the rows of docs/results.md that are missing, and write the page",
    "demo": "train a recipe of the digits on every backend and compare",
}
"""Command -> help. Only the module of the chosen command, of the same name, is imported."""
BAD_INPUT, NON_FINITE = 2, 3


class _Parser(argparse.ArgumentParser):
    """A parser that raises UserError on a bad command line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status; see ``exit_status``."""
    words = sys.argv[1:] if argv is None else argv

    def command() -> int:
        with leave_at_once(), once_per_machine():
            arguments = _parser(words).parse_args(words)
        return int(arguments.run(arguments) or 0)

    return exit_status(command, words)


def exit_status(command: Callable[[], int], words: Sequence[str] = ()) -> int:
    """Runs a command and turns its exceptions into an exit status.

    Any exception that is not listed here is a bug: it passes through, with its traceback.

    Args:
        words: of the command line; the end of a line in a path does not end an error.

    Returns:
        0: the command is done.
        2: bad input; stderr has one ``error:`` line for each error.
        3: training went non-finite.
        128 + n: signal n ended the command, with the state saved.
    """
    _prepare_streams()
    try:
        status = command()
        sys.stdout.flush()  # so that a failed write raises its error here
        return status
    except UserError as error:
        text = str(error)
        for word in words:
            text = text.replace(word, printable(word)) if "\n" in word else text
        for line in text.split("\n"):
            _complain(line)
        return BAD_INPUT
    except NonFiniteError as error:
        _complain(str(error))
        return NON_FINITE
    except MemoryError as error:
        _complain(f"not enough memory ({error}); make the model, its memory or the batch smaller")
        return BAD_INPUT
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of the pipe (head, less) has ended. That is no error, and output is over.
        _silence(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        # The error names no file and the output works: only the traceback shows the cause.
        if not error.filename and not _output_lost():
            raise
        _complain(f"{error.filename or 'standard output'}: {error.strerror}")
        _silence(sys.stdout)
        return BAD_INPUT


def _prepare_streams() -> None:
    """Lets every text be printed: characters that the terminal cannot encode are escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the parent process closed it
            setattr(sys, name, open(os.devnull, "w"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _complain(text: str) -> None:
    """Prints an ``error:`` line, unless standard error is lost."""
    if not text:  # another process of the run prints the error
        return
    try:
        say(f"error: {text}", errors=True)
    except OSError:
        _silence(sys.stderr)


def _output_lost() -> bool:
    """Whether writing to standard output fails, e.g. on a full disk or a closed terminal."""
    try:
        print(flush=True)  # an empty write would not fail, an empty line does
    except OSError:
        return True
    return False


def _silence(stream: TextIO) -> None:
    """Sends a stream to the null device, so that its pending text raises no further error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """A parser with the names of all commands and the arguments of the chosen one."""
    parser = _Parser(prog="triptych", description="Self-supervised pretraining on three frameworks")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        if name == chosen:
            choose_kernels()
            with held_back():
                importlib.import_module("numpy")  # it starts the threads of its OpenBLAS
            command = importlib.import_module(f"triptych.core.commands.{name}")
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    return parser


def say(text: str, *, errors: bool = False) -> None:
    """Prints one line on standard output or error; control characters are escaped."""
    print(printable(text), file=sys.stderr if errors else sys.stdout, flush=True)


def path(text: str) -> Path:
    """The type of arguments that are paths; expands ``~`` to the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise argparse.ArgumentTypeError(f"{text}: no user {user[1:]} here; write ./{text}")
    return Path(expanded)


def add_spec_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """``-c`` and ``-o``, the same for every command that reads a spec."""
    parser.add_argument(
        "-c",
        "--config",
        required=required,
        metavar="FILE",
        help="the run's YAML spec, or a recipe by its name, e.g. moco_v3/vit_small",
    )
    parser.add_argument(
        "-o",
        "--override",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="set keys of the spec, e.g. -o train.steps=100 seed=1; may be repeated",
    )


def add_backend_argument(
    parser: argparse.ArgumentParser,
    *extra: str,
    default: str = "the spec's, else the first installed",
) -> None:
    """``--backend``, which takes a backend's name or a name in ``extra``."""
    # Imported here and not above: Ctrl-C during imports at the top meets Python's own handler.
    from triptych.core.machine.environment import NAMES

    names = (*NAMES, *extra)
    parser.add_argument(
        "--backend",
        metavar="NAME",
        choices=names,
        help=f"{' | '.join(names)}; default: {default}",
    )


if __name__ == "__main__":
    sys.exit(main())
