"""The model that ``eval`` evaluates: spec, weights, and the processes that share the images."""

import argparse
import json
from collections.abc import Sequence
from typing import NamedTuple

from triptych.core import config, formats, launch
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Ranks, State
from triptych.core.data import Source, split_digest
from triptych.core.errors import UserError
from triptych.core.files.checksum import state_digest
from triptych.core.machine.launchers import once_per_machine
from triptych.core.optim.scaling import steps_behind
from triptych.core.parallel.agreement import check_same, program_digest, sections
from triptych.core.parameters import initial_state

FEATURES = "features"
"""Name of the evaluation that writes features."""
INITIAL, PIXELS = "initial", "pixels"
"""Values of ``--weights`` for what trained weights are compared with."""


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


BESIDE_SPEC = {
    "evaluation": "evaluation",
    "--layers": "layers",
    "--tokens": "tokens",
    "--split": "split",
}
"""Name in a message -> argument that the spec does not hold."""


def processes(
    asked: RunSpec, arguments: argparse.Namespace, say: launch.Say
) -> tuple[RunSpec, str, Ranks]:
    """The spec of the evaluation, its backend, and the processes that share its images.

    Args:
        asked: the spec as the command gives it.
    """
    with once_per_machine():
        spec = launch.sharing_images(asked)
        name = launch.choose_backend(arguments.backend, spec, say)
        return spec, name, launch.join(spec, name)


def check_alike(
    arguments: argparse.Namespace,
    ranks: Ranks,
    spec: RunSpec,
    weights: State,
    sources: Sequence[Source],
) -> None:
    """Raises UserError if the processes do not all evaluate the same weights on the same images."""
    if ranks.world == 1:
        return
    common = {name: str(getattr(arguments, key, None)) for name, key in BESIDE_SPEC.items()}
    common |= {"version of the program": program_digest(), **sections(spec)}
    common["images of the data set"] = "".join(split_digest(source) for source in sources)
    check_same(ranks, {**common, "weights": state_digest(weights)})


def spec_of(arguments: argparse.Namespace) -> RunSpec:
    """The spec of a model's evaluation, with the options as overrides."""
    for flag, value in (("-c", arguments.config), ("--weights", arguments.weights)):
        if not value:
            raise UserError(f"eval {arguments.evaluation}: {flag} is missing")
    overrides = [*arguments.overrides, *overrides_of(arguments)]
    if arguments.evaluation == FEATURES and arguments.tokens in TOKENS:
        overrides.append(f"evaluate.tokens={arguments.tokens}")
    return config.load(arguments.config, overrides)


def weights_of(arguments: argparse.Namespace, spec: RunSpec) -> tuple[State, int]:
    """The weights, and the number of steps that trained them."""
    if str(arguments.weights) == INITIAL:
        return initial_state(spec), 0
    weights = formats.load_encoders(arguments.weights, spec)
    return weights, steps_behind(weights)


def overrides_of(arguments: argparse.Namespace) -> list[str]:
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
