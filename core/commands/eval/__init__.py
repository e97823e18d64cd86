"""``eval``: evaluates given weights: their features, or a classifier; or writes features."""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial

from triptych.core import cli, config, launch
from triptych.core.commands import train
from triptych.core.commands.eval.features import SPLITS, write_features
from triptych.core.commands.eval.model import (
    FEATURES,
    INITIAL,
    OPTIONS,
    PIXELS,
    Option,
    check_alike,
    overrides_of,
    processes,
    spec_of,
    weights_of,
)
from triptych.core.config.spec import RunSpec
from triptych.core.data import few_levels, open_splits
from triptych.core.engine import Engine
from triptych.core.errors import UserError, printable
from triptych.core.evaluation import PROTOCOLS, classifier
from triptych.core.evaluation.row import Evaluation
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.stored import Stored
from triptych.core.evaluation.subject import alone, raw_pixels
from triptych.core.files.features import FORMATS, read_features
from triptych.core.inference import PICK
from triptych.core.machine.launchers import launched, once_per_machine
from triptych.core.parallel.agreement import together, whole

AT_THE_END = 10**9
"""Steps between the evaluations of a run that has one at its end only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each evaluation."""
    choices = parser.add_subparsers(dest="evaluation", required=True, metavar="EVALUATION")
    summaries = {name: protocol.summary for name, protocol in PROTOCOLS.items()}
    for name, text in {**summaries, FEATURES: f"write features to {_suffixes()}"}.items():
        sub = choices.add_parser(name, help=text, description=text)
        _add_model(sub, pixels=name != FEATURES)
        _add_options(sub, OPTIONS[name])
        if name == FEATURES:
            _add_export(sub)
        else:
            _add_files(sub)
    for name, title in classifier.TITLES.items():
        text = f"{title}: train a recipe on the weights, or score a trained classifier"
        _add_classifier(choices.add_parser(name, help=text, description=text))


def _add_classifier(parser: argparse.ArgumentParser) -> None:
    train.add_arguments(parser)
    _add_weights(parser, required=True, pixels=False)
    text = "train nothing; evaluate the classifier of --weights on the held-out images"
    parser.add_argument("--eval-only", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="with --eval-only: print rows as JSON")


def _suffixes() -> str:
    return ", ".join(suffix.removeprefix(".") for suffix in FORMATS)


def _add_model(parser: argparse.ArgumentParser, *, pixels: bool) -> None:
    cli.add_spec_arguments(parser, required=False)
    cli.add_backend_argument(parser)
    _add_weights(parser, required=False, pixels=pixels)


def _add_weights(parser: argparse.ArgumentParser, *, required: bool, pixels: bool) -> None:
    of_pixels = f"; {PIXELS}: the pixels in the place of features" if pixels else ""
    parser.add_argument(
        "--weights",
        required=required,
        type=cli.path,
        metavar="PATH",
        help="a run or checkpoint folder, a .pth, safetensors or npz file of a known format, or a "
        f"name that info weights lists; {INITIAL}: the random weights that a run begins with"
        f"{of_pixels}",
    )


def _add_options(parser: argparse.ArgumentParser, options: dict[str, Option]) -> None:
    for name, option in options.items():
        parser.add_argument(
            f"--{name}",
            choices=option.choices,
            nargs="+" if option.several else None,
            metavar=None if option.choices else name.upper(),
            help=f"{option.help}; default: the spec's {option.key}",
        )


def _add_files(parser: argparse.ArgumentParser) -> None:
    for name, text in (("bank", "labelled images"), ("queries", "images to classify")):
        parser.add_argument(
            f"--{name}",
            type=cli.path,
            metavar="FILE",
            help=f"features of the {text}, in the place of -c and --weights; a file that holds "
            "both splits may stand for both",
        )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        required=True,
        type=cli.path,
        metavar="FILE",
        help=f"file to write; its ending chooses the format: {_suffixes()}",
    )
    parser.add_argument("--force", action="store_true", help="replace an earlier file")
    parser.add_argument(
        "--tokens",
        choices=PICK,
        help="the feature of an image; default: the spec's evaluate.tokens",
    )
    parser.add_argument(
        "--layers",
        default="",
        metavar="LIST",
        help="blocks (in a ResNet: stages) whose raw output is written beside the final features, "
        "from 0 on, e.g. 3,11",
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="train",
        help="images: the labelled ones of training, the held-out ones, or both; default: train",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints one line, or one JSON object, for each row of the evaluation; or writes features."""
    supervised = arguments.evaluation in classifier.TITLES
    if supervised and not arguments.eval_only:
        return _train(arguments)
    # With --json a program reads standard output, so messages go to standard error.
    json_asked = getattr(arguments, "json", False)
    say = launch.quiet if launched().rank else partial(cli.say, errors=json_asked)
    if arguments.evaluation == FEATURES:
        return write_features(arguments, say)
    if not supervised and (arguments.bank or arguments.queries):
        launch.refuse_launchers("eval of --bank and --queries")
        rows = _rows_of_files(arguments)
    elif str(arguments.weights) == PIXELS and not supervised:
        launch.refuse_launchers("eval of --weights pixels")
        rows = _rows_of_pixels(arguments, say)
    else:
        rows = _rows_of_model(arguments, say)
    if launched().rank:
        return 0
    if arguments.json:
        print(json.dumps([row.as_json() for row in rows], indent=1, allow_nan=False))
    else:
        for row in rows:
            print("\n  ".join([row.line(), *row.details()]))
    return 0


def _rows_of_pixels(arguments: argparse.Namespace, say: launch.Say) -> Sequence[Evaluation]:
    spec = spec_of(arguments)
    split = Split(spec, open_splits(spec, say=say))
    protocol = PROTOCOLS[arguments.evaluation]
    protocol.check(split)
    rows = protocol.rows(split, raw_pixels())
    _say_what_was_met(split, say)
    return rows


def _rows_of_model(arguments: argparse.Namespace, say: launch.Say) -> Sequence[Evaluation]:
    with once_per_machine():
        asked = spec_of(arguments)
    spec, name, ranks = processes(asked, arguments, say)
    with ExitStack() as stack:
        stack.enter_context(closing(ranks))
        with together(ranks):
            split = Split(spec, open_splits(spec, say=say))
            branch, evaluate = _evaluation(arguments, split)
            weights, step = weights_of(arguments, spec)
            if branch is None:
                engine = launch.open_classifier(spec, name, weights, ranks)
            else:
                engine = launch.open_encoder(spec, name, weights, branch, ranks=ranks)
            stack.enter_context(closing(engine))
        check_alike(arguments, ranks, spec, weights, (split.bank, split.queries))
        del weights  # the engine has a copy of what it needs
        with whole(ranks):
            rows = evaluate(engine, step)
    _say_what_was_met(split, say)
    return rows


def _say_what_was_met(split: Split, say: launch.Say) -> None:
    for name in split.damaged():
        say(f"damaged, left out of the evaluation: {printable(name)}")
    for name, text in split.warnings():
        say(f"warning: {printable(name)}: {printable(text)}")
    if warning := few_levels(split.bank):
        say(f"warning: {warning}")


def _evaluation(
    arguments: argparse.Namespace, split: Split
) -> tuple[str | None, Callable[[Engine, int], Sequence[Evaluation]]]:
    """The evaluation that the command names.

    Returns:
        The branch whose encoder alone is evaluated, or None for the whole model; and a function:
        (engine, steps that trained it) -> rows.

    Raises:
        UserError: the split cannot be evaluated so, or the recipe is one of another method.
    """
    if arguments.evaluation in classifier.TITLES:
        _check_recipe(arguments, split.spec)
        classifier.check(split)
        return None, partial(classifier.rows, split)
    protocol = PROTOCOLS[arguments.evaluation]
    protocol.check(split)
    choice = protocol.choice(split.spec.evaluate)

    def rows(engine: Engine, step: int) -> Sequence[Evaluation]:
        return protocol.rows(split, alone(engine, step, choice))

    return choice.branch, rows


def _train(arguments: argparse.Namespace) -> int:
    """Trains the recipe on the weights as the command ``train`` does, and evaluates the end."""
    with once_per_machine():
        if arguments.json:
            raise UserError("--json: a training's rows are in its log; give --eval-only, or none")
        if str(arguments.weights) != INITIAL:
            arguments.overrides.append(f"init.weights={json.dumps(str(arguments.weights))}")
        _check_recipe(arguments, spec := config.load(arguments.config, arguments.overrides))
        if spec.data.lacks_held_out:
            raise UserError(f"{spec.data.held_out_key}: not set; eval scores held-out images")
        if not spec.evaluate.every:
            arguments.overrides.append(f"evaluate.every={AT_THE_END}")
    return train.run(arguments)


def _check_recipe(arguments: argparse.Namespace, spec: RunSpec) -> None:
    name = arguments.evaluation
    if spec.method.name != name:
        raise UserError(
            f"{arguments.config}: method.name: {spec.method.name}; eval {name} needs a recipe with "
            f"method {name}"
        )
    if arguments.eval_only and (arguments.output or arguments.resume):
        raise UserError("--eval-only trains nothing; leave out --output and --resume")


def _rows_of_files(arguments: argparse.Namespace) -> Sequence[Evaluation]:
    if arguments.weights or not (arguments.bank and arguments.queries):
        raise UserError("--bank and --queries belong together, and take the place of --weights")
    bank = read_features(arguments.bank)
    overrides = [*arguments.overrides, *overrides_of(arguments)]
    if arguments.config:
        spec = config.load(arguments.config, overrides)
    else:
        spec = config.loads(str(bank.about.get("spec", "")), str(arguments.bank), overrides)
    same = arguments.bank == arguments.queries
    stored = Stored(spec, bank, bank if same else read_features(arguments.queries))
    protocol = PROTOCOLS[arguments.evaluation]
    subject = stored.subject(protocol.choice(spec.evaluate))
    protocol.check(stored)
    return protocol.rows(stored, subject)
