"""``eval features``: the features of all images, written into a file."""

import argparse
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext

from triptych.core import cli, config, launch
from triptych.core.commands.eval.model import FEATURES, check_alike, processes, spec_of, weights_of
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, Ranks
from triptych.core.data import Source, open_splits
from triptych.core.errors import UserError, printable
from triptych.core.evaluation.export import Exported, export, name_width
from triptych.core.evaluation.subject import depth
from triptych.core.files.features import Append, Header, file_format, writing
from triptych.core.formats import destination
from triptych.core.machine.launchers import once_per_machine
from triptych.core.parallel.agreement import together, whole
from triptych.core.training.terminal import Terminal

SPLITS = {"train": (False,), "held_out": (True,), "both": (False, True)}
"""Value of ``--split`` -> whether its images are held out."""


def write_features(arguments: argparse.Namespace, say: launch.Say) -> int:
    """Writes the file. The main process of several writes; all compute.

    Raises:
        UserError: as in ``export``, or spec, weights, split or layers cannot be used.
    """
    with once_per_machine():
        file_format(arguments.output)
        destination.refuse_loss(
            arguments.output,
            arguments.weights,
            force=arguments.force,
            name=f"--output {arguments.output}",
            held="the weights",
        )
        asked = spec_of(arguments)
    spec, backend, ranks = processes(asked, arguments, say)
    with ExitStack() as stack:
        stack.enter_context(closing(ranks))
        with together(ranks):
            layers = _layers(arguments.layers, spec)
            halves = _halves(spec, SPLITS[arguments.split])
            sources = list(halves.values())
            weights, step = weights_of(arguments, spec)
            branch, tokens = spec.evaluate.branch, arguments.tokens or spec.evaluate.tokens
            engine = launch.open_encoder(spec, backend, weights, branch, ranks=ranks)
            stack.enter_context(closing(engine))
        check_alike(arguments, ranks, spec, weights, sources)
        del weights  # the engine has a copy of what it needs
        about = {
            "spec": config.dump(asked),
            "weights": str(arguments.weights),
            "step": step,
            "backend": backend,
            "branch": branch,
            "tokens": tokens,
            "interpolation": spec.augment.eval_interpolation,
            "depth": depth(spec),
        }
        header = Header(sources[0].classes, about, name_width(sources))
        terminal = Terminal(sum(map(len, sources)), title=FEATURES, shown=ranks.is_main)
        stack.enter_context(closing(terminal))
        with whole(ranks), _writing(arguments, header, ranks) as append:
            done = export(
                engine, halves, append, tokens=tokens, layers=layers, advance=terminal.advance
            )
    if ranks.is_main:
        _report(arguments, done)
    return 0


def _writing(
    arguments: argparse.Namespace, header: Header, ranks: Ranks
) -> AbstractContextManager[Append]:
    """The main process writes the file. The others compute alone."""
    if ranks.is_main:
        return writing(arguments.output, header)
    return nullcontext(_keep_nothing)


def _keep_nothing(columns: Mapping[str, Array]) -> None:
    """Takes the place of ``Append``."""


def _report(arguments: argparse.Namespace, done: Exported) -> None:
    for name in done.skipped:
        cli.say(f"damaged, left out: {printable(name)}")
    for name, text in done.warned.items():
        cli.say(f"warning: {printable(name)}: {printable(text)}")
    shapes = ", ".join(f"{name} {shape}" for name, shape in done.shapes.items())
    cli.say(f"{arguments.output}: {done.images} images, {shapes}")


def _halves(spec: RunSpec, wanted: Sequence[bool]) -> dict[bool, Source]:
    """Whether images are held out -> these images."""
    splits = open_splits(spec)
    if splits.held_out is None and True in wanted:
        raise UserError(
            f"--split: data.name {spec.data.name} has no held-out images as it is given; set "
            f"{spec.data.held_out_key}, or give --split train"
        )
    halves = {False: splits.bank, True: splits.held_out}
    return {half: source for half, source in halves.items() if source and half in wanted}


def _layers(text: str, spec: RunSpec) -> tuple[int, ...]:
    numbers = [part.strip() for part in text.split(",") if part.strip()]
    count = depth(spec)
    if wrong := [n for n in numbers if not n.isdecimal() or int(n) >= count]:
        raise UserError(f"--layers {text}: {wrong[0]}: expected numbers from 0 to {count - 1}")
    return tuple(dict.fromkeys(map(int, numbers)))
