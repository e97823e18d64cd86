"""Plans a conversion: what of a file is used, under which names it is written, what is missing.

A plan reads names and shapes only. ``core.formats.destination`` writes it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError, printable
from triptych.core.files.tree import Stored
from triptych.core.formats import canonical, checks
from triptych.core.formats.adapting import adapted
from triptych.core.formats.choice import (
    NO_PLACE,
    STUDENT,
    UNCOUNTED,
    Choice,
    choose,
    foreign,
    part_of,
)
from triptych.core.formats.continuing import training_state
from triptych.core.formats.detection import FORMATS, Source
from triptych.core.formats.format import Format, facts_of
from triptych.core.formats.moments import STEP
from triptych.core.formats.opening import opened
from triptych.core.formats.positions import Way
from triptych.core.formats.rules import COUNTER, fits, named
from triptych.core.optim import scaling
from triptych.core.parameters import Param, table

SHOWN = 8
"""Number of problems of one kind that are listed."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """What a conversion is asked for.

    Attributes:
        target: name of the format to write.
        wanted: name of the file's format; None: it is recognised.
        recipe: spec of the run, as in ``config.load``; None: the file's own.
        overrides: keys of the spec.
        average: whether to take averaged weights; None: the file has one kind.
        branch: the encoder to take; None: both, or the only one.
        parts: values of ``choice.PARTS``; empty: all that the target can hold.
        allow_missing: canonical names of tensors that the file may lack. A name that ends in a dot
            stands for all that begin with it.
        allow_unused: names in the file of tensors that the target may lack; as ``allow_missing``.
        positions: way to resample position tables; None: there is none.
        image_size: (height, width) of the wanted model; None: that of the file.
        channels: of the wanted model; None: those of the file.
    """

    target: str
    wanted: str | None = None
    recipe: str | None = None
    overrides: Sequence[str] = ()
    average: bool | None = None
    branch: str | None = None
    parts: Sequence[str] = ()
    allow_missing: Sequence[str] = ()
    allow_unused: Sequence[str] = ()
    positions: Way | None = None
    image_size: tuple[int, int] | None = None
    channels: int | None = None


class Row(NamedTuple):
    """A tensor that is converted.

    Attributes:
        theirs: names in the file, with shapes. Empty: no file of the format has the tensor.
        name: canonical name.
        written: names in the target, with shapes.
        changes: past participles, e.g. "transposed". Empty: the values stay as they are.
    """

    theirs: Mapping[str, Shape]
    name: str
    written: Mapping[str, Shape]
    changes: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The heading under which a table lists the row."""
        if not self.theirs:
            return "new, at its initial value"
        same = self.theirs.keys() == self.written.keys()
        return ", ".join(self.changes) or ("used" if same else "renamed")


@dataclass
class Plan:
    """A conversion.

    Attributes:
        source: the file.
        target: the format to write.
        choice: of what is converted.
        before: spec of the file.
        spec: of what is written.
        rows: what is converted.
        tensors: what is written of the model, by canonical name.
        written: the same by name in the target, with what has no canonical twin.
        optimizer: what is written of the optimizer, by canonical name.
        left: name in the file -> why it is left out.
        unused: names in the file that nothing explains, with shapes.
        missing: canonical names that the file lacks, with shapes.
        notes: what starts anew, and what the target's system computes otherwise.
        problems: a line for each reason against the conversion.
        step: number of updates, if it is known.
        epoch: number of whole epochs, 0 if it is not known.
    """

    source: Source
    target: Format
    choice: Choice
    before: RunSpec
    spec: RunSpec
    rows: list[Row] = field(default_factory=list)
    tensors: dict[str, Stored] = field(default_factory=dict)
    written: dict[str, Stored] = field(default_factory=dict)
    optimizer: dict[str, Stored] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    unused: dict[str, Shape] = field(default_factory=dict)
    missing: dict[str, Shape] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    step: int | None = None
    epoch: int = 0

    @property
    def own(self) -> bool:
        """Whether the target has canonical names."""
        return self.choice.layout is canonical.FORMAT.layouts[0]


class Check(NamedTuple):
    """The result of a self-check.

    Attributes:
        branch: whose encoder.
        reading: relative difference between the converted features and those of the file's own
            arithmetic.
        writing: the same for the target's arithmetic.
    """

    branch: str
    reading: float
    writing: float


def plan(path: Path, request: Request) -> Plan:
    """Plans a conversion.

    Args:
        path: of the file or folder.
        request: what is asked for.

    Raises:
        UserError: the file cannot be used, or the target cannot hold what is asked for. Problems of
            single tensors stand in ``Plan.problems``.
    """
    target = _target(request.target)
    found = opened(
        path,
        request.wanted,
        request.recipe,
        request.overrides,
        average=request.average,
        trained=_trained(request),
    )
    try:
        return _planned(found.source, found.spec, target, request)
    except UserError as error:
        lines = str(error).splitlines()
        name = printable(str(path))
        raise UserError(
            "\n".join(line if line.startswith(name) else f"{name}: {line}" for line in lines)
        ) from error


def _trained(request: Request) -> bool:
    """Whether the state of the optimizer is wanted. Otherwise its faults do not count."""
    return "optimizer" in request.parts if request.parts else request.branch is None


def _target(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"--to {name}: unknown; known are {', '.join(FORMATS)}")
    if name != canonical.FORMAT.name and FORMATS[name].output is None:
        raise UserError(f"--to {name}: {FORMATS[name].about} is only read")
    return FORMATS[name]


def _planned(source: Source, before: RunSpec, target: Format, request: Request) -> Plan:
    spec = _wanted_spec(before, request)
    choice = choose(source, spec, target, request.branch, request.parts)
    made = Plan(source, target, choice, before, spec)
    everything = {**source.tensors, **source.fresh}
    chosen = {ours: everything[name] for ours, name in choice.names.items()}
    chosen |= _fresh(source, choice)
    changed = adapted(chosen, before.model, spec.model, request.positions)
    made.tensors.update({**chosen, **{name: tensor for name, (tensor, _) in changed.items()}})
    made.left.update({source.named(name): why for name, why in choice.left.items()})
    _write(made, {name: how for name, (_, how) in changed.items()})
    _optimizer(made, changed.keys())
    _account(made, request)
    made.notes.extend(_fixed(made))
    return made


def _fixed(made: Plan) -> Iterator[str]:
    """What the target's system computes otherwise than the model, since its code fixes it."""
    told = facts_of(made.spec)
    for key, value in made.target.constants.items():
        if (own := told.get(key, value)) != value:
            yield (
                f"{key}: {own}; {made.target.about} computes with {value} and no file says so: set "
                "it there, or the features differ"
            )


def _fresh(source: Source, choice: Choice) -> dict[str, Stored]:
    """What no file of the format has, for the networks that are converted."""
    found = {}
    for name, tensor in source.fresh.items():
        new = name.replace(f"{choice.branch}.", STUDENT, 1) if choice.single else name
        if new.rpartition(".")[0] + ".running_mean" in choice.names:
            found[new] = tensor
    return found


def _wanted_spec(spec: RunSpec, request: Request) -> RunSpec:
    """The spec with another image size or number of channels."""
    overrides = []
    if request.image_size is not None:
        overrides.append(f"model.image_size={list(request.image_size)}")
    if request.channels is not None:
        overrides += [f"{section}.channels={request.channels}" for section in ("model", "data")]
        # The normalisation has a number for each channel, or one for all.
        for key in ("mean", "std"):
            values = getattr(spec.augment, key)
            overrides.append(f"augment.{key}={[sum(values) / len(values)]}")
    return config.loads(config.dump(spec), "the converted spec", overrides) if overrides else spec


def _write(made: Plan, changed: Mapping[str, str]) -> None:
    """The tensors under the names of the target, with a row for each."""
    known, facts = made.choice.layout.table, facts_of(made.spec)
    renamed = made.source.renamed
    for name, tensor in made.tensors.items():
        found = known.theirs(name)
        origin = made.choice.names.get(name, name)
        theirs = renamed.origin.get(origin, ())
        if found is None:
            counter = name.endswith(COUNTER)
            why = UNCOUNTED if counter else NO_PLACE
            made.left.update(dict.fromkeys(theirs, why))
            if not counter:
                made.problems.append(f"{name}: {NO_PLACE}")
            continue
        names, change = found
        parts = dict(zip(names, change.from_canonical(tensor, facts), strict=True))
        made.written.update(parts)
        after = change.name if next(iter(parts.values())) is not tensor else ""
        words = _words(renamed.changes.get(origin, ""), changed.get(name, ""), after)
        shapes = {part: made.source.place.tensors[part].shape for part in theirs}
        made.rows.append(Row(shapes, name, {n: t.shape for n, t in parts.items()}, words))
    made.written.update(foreign(made.source, made.target, made.choice))
    ordered = made.choice.layout.ordered(made.written)
    made.written.clear()
    made.written.update(ordered)


def _words(before: str, adapted: str, after: str) -> tuple[str, ...]:
    """What happens to a tensor on the way from the file to the target."""
    after = "split" if after == "joined" else after
    if before == after and not adapted:
        return ()  # e.g. transposed twice
    return tuple(word for word in (before, adapted, after) if word)


def _optimizer(made: Plan, changed: Collection[str]) -> None:
    """The state of the optimizer, where file and target have one."""
    source = made.source
    own = {n: t for n, t in source.tensors.items() if part_of(n) == "optimizer"}
    if not own and source.optimizer is None:
        if source.layout.kind == "pretraining" and made.choice.extras:
            made.notes.append("optimizer: starts anew: the file holds none")
        return
    if "optimizer" not in made.choice.parts or not made.choice.extras:
        made.left["optimizer"] = "--parts or --branch leaves it out"
        return
    if not made.own and made.target.moments is None:
        made.left["optimizer"] = f"files of {made.target.about} hold none"
        return
    if source.optimizer is not None and not own:
        state = training_state(source.optimizer, made.before, made.notes.append)
        state = scaling.fitted(state, made.before.precision) if made.own else state
        own = {name: Stored.of(np.asarray(array)) for name, array in state.items()}
        made.notes.extend(source.format.remarks)
    if lost := [n for n in own if any(n.endswith(f".{name}") for name in changed)]:
        made.problems.append(
            f"{lost[0]}: its tensor gets another shape; leave out the optimizer by --parts"
        )
    for name in () if made.own else scaling.ENTRIES:
        if name in own and not (made.target.moments and made.target.moments.holds(name)):
            made.left[name] = f"files of {made.target.about} hold none; it begins anew"
            del own[name]
    made.optimizer.update(own)


def _account(made: Plan, request: Request) -> None:
    """What is unused and missing, and the problems."""
    source, choice = made.source, made.choice
    # A ViT computes something else without its second token, so that is not left out in silence.
    beside = () if source.layout.kind == "distilled" else source.layout.beside
    kept = choice.extras and (made.own or source.format is made.target)
    for name, tensor in source.renamed.unknown.items():
        if kept:
            made.left[name] = "kept as it is: it has no canonical twin"
        elif any(fits(template, name) for template in beside):
            made.left[name] = "beside the model"
        else:
            made.unused[name] = tensor.shape
    params = _required(made)
    absent = {p.name: p.shape for p in params if p.name not in made.tensors}
    made.missing.update(absent)
    if not made.rows:
        made.problems.append("nothing of the file can be converted")
    refused = {n: s for n, s in made.unused.items() if not named(n, request.allow_unused)}
    made.problems += _listed("unused", refused, "--allow-unused NAME")
    refused = {n: s for n, s in made.missing.items() if not named(n, request.allow_missing)}
    made.problems += _listed("missing", refused, "--allow-missing NAME")
    made.problems += _misfits(params, made.tensors)
    shapes = {param.name: param.shape for param in table(made.spec)}
    if faults := [*checks.optimizer_faults(made.optimizer, shapes)]:
        made.problems += faults[:SHOWN]
        made.optimizer.clear()
    step = made.optimizer.get(STEP)
    made.step = None if step is None else int(step.array())
    made.epoch = source.format.epochs(source.content) or 0


def _required(made: Plan) -> list[Param]:
    """The tensors of the model that the target should get.

    The heads of one branch are not all of the method's heads.
    """
    single, parts = made.choice.single, made.choice.parts
    counted = COUNTER in made.choice.layout.table.norms
    params = [p for p in table(made.spec) if counted or not p.name.endswith(COUNTER)]
    if not single:
        return [param for param in params if part_of(param.name) in parts]
    parts &= {part_of(name) for name in made.choice.names} - {"heads"}
    return [param for param in params
            if part_of(param.name) in parts and param.name.startswith(STUDENT)]  # fmt: skip


def _misfits(params: Sequence[Param], tensors: Mapping[str, Stored]) -> Iterator[str]:
    """The tensors that the model cannot have."""
    for param in params:
        tensor = tensors.get(param.name)
        if tensor is None:
            continue
        if tensor.shape != param.shape:
            yield f"misshapen {param.name}: expected {param.shape}, got {tensor.shape}"
        elif param.init.kind != "count" and not tensor.dtype.startswith(("float", "bfloat")):
            yield f"unusable {param.name}: expected floating-point numbers, got {tensor.dtype}"
    memory = {n: t.array() for n, t in tensors.items() if n.startswith("memory.")}
    yield from (f"unusable {fault}" for fault in checks.faults(memory, params))


def _listed(kind: str, tensors: Mapping[str, Shape], remedy: str) -> Iterator[str]:
    """A line for each of the first tensors."""
    for name, shape in list(tensors.items())[:SHOWN]:
        yield f"{kind} {printable(name)} {shape}; name it by {remedy} if that is meant"
    if len(tensors) > SHOWN:
        yield f"{kind}: {len(tensors) - SHOWN} more"
