"""``eval``: evaluates given weights: their features, or a classifier; or writes features."""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from triptych.core import cli, config, formats, launch
from triptych.core.commands import train
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import State
from triptych.core.data import Source, few_levels, open_splits
from triptych.core.engine import PICK, Engine
from triptych.core.errors import UserError, printable
from triptych.core.evaluation import PROTOCOLS, classifier
from triptych.core.evaluation.export import Exported, export, name_width
from triptych.core.evaluation.row import Evaluation
from triptych.core.evaluation.split import Split
from triptych.core.evaluation.stored import Stored
from triptych.core.evaluation.subject import alone, depth, raw_pixels
from triptych.core.files.features import FORMATS, Header, file_format, read_features, writing
from triptych.core.parameters import initial_state
from triptych.core.training.terminal import Terminal

FEATURES = "features"
"""Name of the evaluation that writes features."""
SPLITS = {"train": (False,), "held_out": (True,), "both": (False, True)}
"""Value of ``--split`` -> whether its images are held out."""
INITIAL, PIXELS = "initial", "pixels"
"""Values of ``--weights`` for what trained weights are compared with."""
AT_THE_END = 10**9
"""Steps between the evaluations of a run that has one at its end only."""


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
COMMON = {
    "branch": BRANCH,
    "tokens": Option("evaluate.tokens", "the feature of an image", TOKENS),
}
OPTIONS = {
    "knn": COMMON,
    "probe": COMMON,
    "rank": COMMON,
    "lowshot": {
        "branch": BRANCH,
        "tokens": Option("evaluate.lowshot.tokens", "the feature of an image", TOKENS),
        "shots": Option("evaluate.lowshot.shots", "labelled images per class, e.g. 1,2,5,1%%"),
        "splits": Option("evaluate.lowshot.files", "files that name them", several=True),
    },
    FEATURES: {"branch": BRANCH},
}
"""Evaluation -> its options, by name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each evaluation."""
    choices = parser.add_subparsers(dest="evaluation", required=True, metavar="EVALUATION")
    summaries = {name: protocol.summary for name, protocol in PROTOCOLS.items()}
    for name, text in {**summaries, FEATURES: f"write features to {_suffixes()}"}.items():
        sub = choices.add_parser(name, help=text, description=text)
        _add_model(sub)
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
    _add_weights(parser, required=True)
    text = "train nothing; evaluate the classifier of --weights on the held-out images"
    parser.add_argument("--eval-only", action="store_true", help=text)
    parser.add_argument("--json", action="store_true", help="with --eval-only: print rows as JSON")


def _suffixes() -> str:
    return ", ".join(suffix.removeprefix(".") for suffix in FORMATS)


def _add_model(parser: argparse.ArgumentParser) -> None:
    cli.add_spec_arguments(parser, required=False)
    cli.add_backend_argument(parser)
    _add_weights(parser, required=False)


def _add_weights(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--weights",
        required=required,
        type=cli.path,
        metavar="PATH",
        help="a run or checkpoint folder, a .pth, safetensors or npz file of a known format, or a "
        f"name that info weights lists; {INITIAL}: the random weights that a run begins with; "
        f"{PIXELS}: for a protocol of features, the pixels in the place of features",
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
    launch.refuse_launchers()
    if arguments.evaluation == FEATURES:
        return _export(arguments)
    # With --json a program reads standard output, so messages go to standard error.
    say = partial(cli.say, errors=arguments.json)
    if not supervised and (arguments.bank or arguments.queries):
        rows = _rows_of_files(arguments)
    else:
        rows = _rows_of_model(arguments, say)
    if arguments.json:
        print(json.dumps([row.as_json() for row in rows], indent=1, allow_nan=False))
    else:
        for row in rows:
            print("\n  ".join([row.line(), *row.details()]))
    return 0


def _rows_of_model(arguments: argparse.Namespace, say: launch.Say) -> Sequence[Evaluation]:
    spec = _spec(arguments)
    split = Split(spec, open_splits(spec, say=say))
    if str(arguments.weights) == PIXELS and arguments.evaluation in PROTOCOLS:
        protocol = PROTOCOLS[arguments.evaluation]
        protocol.check(split)
        rows = protocol.rows(split, raw_pixels())
    else:
        rows = _rows_of_weights(arguments, spec, split, say)
    for name in split.damaged():
        say(f"damaged, left out of the evaluation: {printable(name)}")
    for name, text in split.warnings():
        say(f"warning: {printable(name)}: {printable(text)}")
    if warning := few_levels(split.bank):
        say(f"warning: {warning}")
    return rows


def _rows_of_weights(
    arguments: argparse.Namespace, spec: RunSpec, split: Split, say: launch.Say
) -> Sequence[Evaluation]:
    branch, evaluate = _evaluation(arguments, split)
    weights, step = _weights(arguments, spec)
    name = launch.choose_backend(arguments.backend, spec, say)
    if branch is None:
        engine = launch.open_classifier(spec, name, weights)
    else:
        engine = launch.open_encoder(spec, name, weights, branch)
    del weights  # the engine has a copy of what it needs
    rows = evaluate(engine, step)
    engine.close()
    return rows


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
    if arguments.json:
        raise UserError("--json: the rows of a training are in its log; give --eval-only, or none")
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
    overrides = [*arguments.overrides, *_overrides(arguments)]
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


def _export(arguments: argparse.Namespace) -> int:
    file_format(arguments.output)
    spec = _spec(arguments)
    layers = _layers(arguments.layers, spec)
    halves = _halves(spec, SPLITS[arguments.split])
    weights, step = _weights(arguments, spec)
    backend = launch.choose_backend(arguments.backend, spec, cli.say)
    branch, tokens = spec.evaluate.branch, arguments.tokens or spec.evaluate.tokens
    engine = launch.open_encoder(spec, backend, weights, branch)
    del weights  # the engine has a copy of what it needs
    about = {
        "spec": config.dump(spec),
        "weights": str(arguments.weights),
        "step": step,
        "backend": backend,
        "branch": branch,
        "tokens": tokens,
        "interpolation": spec.augment.eval_interpolation,
        "depth": depth(spec),
    }
    sources = list(halves.values())
    header = Header(sources[0].classes, about, name_width(sources))
    terminal = Terminal(sum(map(len, sources)), title=FEATURES)
    try:
        with writing(arguments.output, header) as append:
            done = export(
                engine,
                halves,
                append,
                tokens=tokens,
                layers=layers,
                advance=terminal.advance,
            )
    finally:
        terminal.close()
        engine.close()
    _report(arguments, done)
    return 0


def _report(arguments: argparse.Namespace, done: Exported) -> None:
    for name in done.skipped:
        cli.say(f"damaged, left out: {printable(name)}")
    for name, text in done.warned.items():
        cli.say(f"warning: {printable(name)}: {printable(text)}")
    shapes = ", ".join(f"{name} {shape}" for name, shape in done.shapes.items())
    cli.say(f"{arguments.output}: {done.images} images, {shapes}")


def _spec(arguments: argparse.Namespace) -> RunSpec:
    """The spec of a model's evaluation, with the options as overrides."""
    for flag, value in (("-c", arguments.config), ("--weights", arguments.weights)):
        if not value:
            raise UserError(f"eval {arguments.evaluation}: {flag} is missing")
    overrides = [*arguments.overrides, *_overrides(arguments)]
    if arguments.evaluation == FEATURES and arguments.tokens in TOKENS:
        overrides.append(f"evaluate.tokens={arguments.tokens}")
    return config.load(arguments.config, overrides)


def _weights(arguments: argparse.Namespace, spec: RunSpec) -> tuple[State, int]:
    """The weights, and the steps that trained them."""
    if str(arguments.weights) == INITIAL:
        return initial_state(spec), 0
    weights = formats.load_encoders(arguments.weights, spec)
    return weights, int(weights.get("optimizer.step", 0))


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


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """The options as overrides of the spec."""
    given = []
    for name, option in OPTIONS.get(arguments.evaluation, {}).items():
        if value := getattr(arguments, name):
            listed = name == "shots" or option.several
            given.append(f"{option.key}={_list(value) if listed else value}")
    return given


def _list(value: str | Sequence[str]) -> str:
    """A comma-separated text, or several texts, as a list of YAML."""
    if isinstance(value, str):
        parts = map(str.strip, value.split(","))
        return json.dumps([int(part) if part.isdecimal() else part for part in parts])
    return json.dumps(list(value))
