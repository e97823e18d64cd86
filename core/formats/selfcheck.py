"""Compares the features of a converted encoder with those of the file that it comes from.

The file's side is the arithmetic of its own system, on its own names and layouts
(``core.formats.arithmetic``). So a matrix that was not transposed, a permutation that was left out
or a branch that was taken for the other one shows, whatever the tables of names say.
"""

from collections import UserDict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from triptych.core import launch, parameters
from triptych.core.config.spec import RunSpec, VitSpec
from triptych.core.contracts import Array
from triptych.core.errors import UserError, printable
from triptych.core.files.tree import Stored
from triptych.core.formats.arithmetic import Arithmetic
from triptych.core.formats.choice import part_of
from triptych.core.formats.conversion import Check, Plan
from triptych.core.formats.forward import Values
from triptych.core.formats.forward import features as forward
from triptych.core.random import stream
from triptych.core.reference.encoders import pooled, resnet, vit
from triptych.core.reference.layers import EVALUATION

LIMIT = 1e-10
"""Largest relative difference between two ways of float64 arithmetic."""


class Side(NamedTuple):
    """The names and values of one of the two files.

    Attributes:
        name: of the format.
        ways: how its system computes.
        tensors: by name in the file.
    """

    name: str
    ways: tuple[Arithmetic, ...]
    tensors: Mapping[str, Stored]


def probe(spec: RunSpec) -> Array:
    """The pixels of one image, the same for every file. (1, C, height, width), float64."""
    shape = (1, spec.model.channels, *spec.model.size)
    return stream(0, "convert/probe").standard_normal(shape)


def features(side: Side, branch: str, spec: RunSpec) -> Array:
    """The final tokens of the probe image by the arithmetic of a file's system.

    Args:
        side: the file.
        branch: "student" or "teacher". A file with one encoder calls it "student".
        spec: gives what the tensors do not show.

    Raises:
        UserError: the system has no arithmetic for these names.
    """
    for way in side.ways:
        if branch in way.prefixes and way.first(branch) in side.tensors:
            try:
                return forward(way, Values(side.tensors), branch, probe(spec), spec.model)
            except KeyError as error:
                raise UserError(
                    f"{side.name}: its encoder needs the tensor {error}, which is missing"
                ) from error
    raise UserError(f"{side.name}: no arithmetic for the encoder of these names")


def converted(tensors: Mapping[str, Stored], branch: str, spec: RunSpec, backend: str) -> Array:
    """The final tokens of the probe image by a canonical encoder.

    Args:
        tensors: by canonical name.
        branch: "student" or "teacher".
        spec: of the run.
        backend: a backend's name, or ``launch.REFERENCE``.

    Returns:
        As ``core.formats.forward.features``; a backend leaves out the token of the mean.
    """
    pixels, name = probe(spec), f"{branch}.encoder"
    if backend != launch.REFERENCE:
        return _by_backend(tensors, branch, spec, backend)
    values = _Widened(tensors)
    if not isinstance(spec.model, VitSpec):
        plain: Array = resnet(values, name, pixels, spec.model)["final"][:, 1:]
        return plain
    tokens: Array = vit(values, name, pixels, spec.model)["final"]
    if not spec.model.fc_norm:
        return tokens
    mean = pooled(values, name, pixels, spec.model, "mean", EVALUATION)
    return np.concatenate([tokens, mean[:, None]], axis=1)


class _Widened(UserDict[str, Array]):
    """Canonical tensors that are read and widened to float64 when they are used."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        super().__init__()
        self._tensors = tensors

    def __getitem__(self, name: str) -> Array:
        return self._tensors[name].array().astype(np.float64)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def _by_backend(tensors: Mapping[str, Stored], branch: str, spec: RunSpec, backend: str) -> Array:
    """As ``converted``, by the engine of a backend in float64."""
    wide = spec.model_copy(update={"precision": "float64"})
    names = [f"{branch}.encoder.{param.name}" for param in parameters.encoder(spec.model)]
    state = {name: tensors[name].array() for name in names if name in tensors}
    engine = launch.open_encoder(wide, backend, state, branch)
    try:
        tokens = engine.embed(probe(spec), tokens="all")["final"]
    finally:
        engine.close()
    # The mean over the map of a ResNet comes first.
    return tokens if isinstance(spec.model, VitSpec) else tokens[:, 1:]


def difference(ours: Array, theirs: Array) -> float:
    """The largest difference, relative to the largest value. Infinite if the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check(made: Plan, backend: str) -> list[Check]:
    """Compares the encoders of a plan with those of file and target.

    Args:
        made: the plan.
        backend: as in ``converted``.

    Raises:
        UserError: a difference is above ``LIMIT``.
    """
    source, target = made.source, made.target
    ours = {**source.tensors, **source.fresh}
    theirs = Side(source.format.name, source.format.arithmetic, source.place.tensors)
    new = Side(target.name, target.arithmetic, made.written)
    found = []
    for branch in _checked(made):
        ours_name = branch if not made.choice.single else "student"
        old = converted(ours, branch, made.before, backend)
        reading = difference(old, features(theirs, branch, made.before)[:, : old.shape[1]])
        if made.spec.model != made.before.model:
            old = converted(made.tensors, ours_name, made.spec, backend)
        writing = difference(old, features(new, ours_name, made.spec)[:, : old.shape[1]])
        found.append(Check(branch, reading, writing))
    for one in found:
        for side, value in ((source.format.name, one.reading), (target.name, one.writing)):
            if not value <= LIMIT:
                _finite(made, one.branch)
                raise UserError(
                    f"{printable(str(source.content.path))}: self-check: the features of the "
                    f"{one.branch}'s encoder differ from those by the arithmetic of {side} by "
                    f"{value:.2g} (limit {LIMIT:g}); nothing was written; report it"
                )
    return found


def _finite(made: Plan, branch: str) -> None:
    """Refuses an encoder whose features would not be numbers."""
    prefix = f"{branch}.encoder."
    for name, tensor in made.source.tensors.items():
        if not name.startswith(prefix) or np.isfinite(values := tensor.array()).all():
            continue
        count = np.count_nonzero(~np.isfinite(values))
        raise UserError(
            f"{printable(str(made.source.content.path))}: {printable(made.source.named(name))}: "
            f"{count} of {values.size} numbers are not finite; nothing was written; take a "
            "checkpoint from before"
        )


def _checked(made: Plan) -> list[str]:
    """The branches in the file whose encoders are converted as a whole."""
    if any(part_of(name) == "encoder" for name in made.missing):
        return []
    branches = {
        name.partition(".encoder.")[0]
        for name in made.choice.names.values()
        if part_of(name) == "encoder"
    }
    return sorted(branches)
