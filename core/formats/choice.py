"""Chooses what of a file is converted, and under which names the target has it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from triptych.core.config.spec import RunSpec, VitSpec
from triptych.core.errors import UserError
from triptych.core.files.tree import Stored
from triptych.core.formats import canonical
from triptych.core.formats.detection import Source
from triptych.core.formats.format import Format, Layout
from triptych.core.formats.opening import WHOLE
from triptych.core.formats.rules import COUNTER

Part = Literal["encoder", "heads", "classifier", "optimizer"]
PARTS: tuple[Part, ...] = ("encoder", "heads", "classifier", "optimizer")
"""Values of ``--parts``. The heads are what a method has beside its encoders, with its memory."""
FOREIGN, OPTIMIZER = "foreign.", "optimizer."
STUDENT, TEACHER = "student.", "teacher."
SINGLE = {"encoder", "classifier"}
"""Parts of a single network."""
NO_PLACE, UNWANTED = "the target has no place for it", "--parts leaves it out"
SHOWN = 6
"""Number of names that a message lists."""
UNCOUNTED = "no batches are counted there"


def part_of(name: str) -> Part | None:
    """The part of a run that a canonical tensor belongs to; None for a name from another system."""
    if name.startswith(FOREIGN):
        return None
    if name.startswith(OPTIMIZER):
        return "optimizer"
    word = name.split(".")[1]
    return "encoder" if word == "encoder" else "classifier" if word == "classifier" else "heads"


@dataclass(frozen=True)
class Choice:
    """What is converted.

    Attributes:
        layout: of the target.
        single: whether the target gets one branch alone, under the names of the student.
        extras: whether the optimizer, and what has no canonical twin, go along.
        parts: what is converted.
        branch: the one that the target gets; "": both.
        names: name in the target's canonical form -> canonical name in the file.
        left: canonical name in the file -> why it is not converted.
    """

    layout: Layout
    single: bool
    extras: bool
    parts: frozenset[str]
    branch: str = ""
    names: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def choose(
    source: Source, spec: RunSpec, target: Format, branch: str | None, parts: Iterable[str]
) -> Choice:
    """Chooses what of a file is converted.

    Args:
        source: the file.
        spec: of the run.
        target: format to write.
        branch: the encoder to take; None: all of the file, or its only one.
        parts: values of ``PARTS``; empty: all that the target can hold. With ``branch``: encoder
            and classifier.

    Raises:
        UserError: the target holds one encoder, the file has two, and ``branch`` is None; or the
            file or the target lacks what is asked for.
    """
    encoders = source.branches
    if not encoders:
        raise UserError(f"holds no encoder, but {source.layout.about} ({source.format.name})")
    held: set[str] = {part for name in source.tensors if (part := part_of(name))}
    if source.optimizer:
        held.add("optimizer")
    asked = frozenset(parts)
    if lost := sorted(asked - held):
        raise UserError(
            f"--parts {','.join(lost)}: the file holds {source.layout.about} "
            f"({source.format.name}) with {', '.join(p for p in PARTS if p in held)} only"
        )
    alone = len(encoders) == 1 and "heads" not in held
    whole = any(layout.kind in WHOLE and layout.holds(spec) for layout in target.layouts)
    if branch is None and whole and _is_whole(source):
        return _both(source, target.layout(spec), asked or frozenset(held))
    wanted = asked or frozenset(held if branch is None else held & SINGLE)
    layout = _single(source, target, spec, wanted, branch)
    chosen = _branch(source, encoders, branch, target)
    choice = _one(source, layout, chosen, wanted, extras=branch is None)
    homeless = {str(part_of(name)) for name, why in choice.left.items() if why == NO_PLACE}
    lost = sorted(homeless & (asked or (SINGLE if alone else set())))
    if "encoder" in lost:
        names = [n for n, why in choice.left.items() if why == NO_PLACE and part_of(n) == "encoder"]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(f"--to {target.name}: no place for {', '.join(names[:SHOWN])}{more}")
    if lost:
        raise UserError(
            f"--to {target.name}: it holds no {' and no '.join(lost)}; leave this out by --parts, "
            "e.g. --parts encoder"
        )
    return choice


def _branch(source: Source, encoders: Sequence[str], branch: str | None, target: Format) -> str:
    """The branch of the only encoder to take."""
    if branch is None and len(encoders) > 1:
        raise UserError(
            f"--to {target.name}: it can hold {_listed(target)}; of {source.layout.about} "
            f"({source.format.name}) it takes one encoder: say --branch student or --branch teacher"
        )
    if branch and branch not in encoders:
        raise UserError(f"--branch {branch}: the file has the encoder of the {encoders[0]} alone")
    return branch or encoders[0]


def _is_whole(source: Source) -> bool:
    """Whether a file should hold both branches. A single network has neither teacher nor memory."""
    both = any(name.startswith((TEACHER, "memory.")) for name in source.tensors)
    return source.layout.kind == "pretraining" or (source.layout.kind == "any" and both)


def _listed(target: Format) -> str:
    return ", ".join(dict.fromkeys(layout.about for layout in target.layouts))


def _single(
    source: Source, target: Format, spec: RunSpec, parts: frozenset[str], branch: str | None
) -> Layout:
    """The layout of one encoder, with heads or classifier where the target knows them."""
    kind = "vit" if isinstance(spec.model, VitSpec) else "resnet"
    fitting = [layout for layout in target.layouts if layout.encoder in ("", kind)]
    with_heads = [x for x in fitting if x.kind == "encoder" and x.holds(spec) and "heads" in parts]
    encoders = [x for x in fitting if x.kind == "encoder" and not x.methods]
    classifiers = [x for x in fitting if x.kind in ("classifier", "linear probe")]
    first = classifiers if "classifier" in parts else encoders
    own = [layout for layout in fitting if layout.kind == "any"]
    single = (*with_heads, *first, *encoders, *classifiers)
    # Where a system has a network of its own for one branch, the choice of a branch means that.
    # Without a choice, canonical names are for what the system's own names cannot say.
    whole = [layout for layout in single if branch or _holds_all(layout, source)]
    for layout in (*whole, *own, *single):
        return layout
    raise UserError(
        f"--to {target.name}: it can hold {_listed(target)}, and the file has "
        f"{source.layout.about} ({source.format.name}) of a {'ViT' if kind == 'vit' else 'ResNet'}"
    )


def _holds_all(layout: Layout, source: Source) -> bool:
    """Whether a layout has a name for everything in a file, except for counters at 0."""
    if source.renamed.unknown or source.optimizer:
        return False
    return all(
        layout.table.theirs(name) or (name.endswith(COUNTER) and not tensor.array().any())
        for name, tensor in source.tensors.items()
    )


def _both(source: Source, layout: Layout, parts: frozenset[str]) -> Choice:
    """Student and teacher under their names."""
    choice = Choice(layout, single=False, extras=True, parts=parts)
    for name in source.tensors:
        if (part := part_of(name)) is None or part == "optimizer":
            continue
        if part not in parts:
            choice.left[name] = UNWANTED
        else:
            choice.names[name] = name
    return choice


def _one(
    source: Source, layout: Layout, branch: str, parts: frozenset[str], *, extras: bool
) -> Choice:
    """One branch under the names of the student."""
    choice = Choice(layout, single=True, extras=extras, parts=parts, branch=branch)
    for name in source.tensors:
        part = part_of(name)
        new = name.replace(f"{branch}.", STUDENT, 1)
        if part is None or part == "optimizer":
            continue
        if part not in parts:
            choice.left[name] = UNWANTED
        elif not name.startswith(f"{branch}."):
            choice.left[name] = f"not of the {branch}"
        elif layout.table.theirs(new) is None:
            choice.left[name] = UNCOUNTED if name.endswith(COUNTER) else NO_PLACE
        else:
            choice.names[new] = name
    return choice


def foreign(source: Source, target: Format, choice: Choice) -> dict[str, Stored]:
    """The tensors that have no canonical twin, under the names that the target keeps them by.

    A target with canonical names keeps them under ``foreign.<format>.``. Another one gets back what
    a file of its own format had.
    """
    if not choice.extras:
        return {}
    own = choice.layout is canonical.FORMAT.layouts[0]
    unknown = source.renamed.unknown
    kept = {n: t for n, t in source.tensors.items() if n.startswith(FOREIGN)}
    if own:
        return {**{f"{FOREIGN}{source.format.name}.{n}": t for n, t in unknown.items()}, **kept}
    prefix = f"{FOREIGN}{target.name}."
    back = {n.removeprefix(prefix): t for n, t in kept.items() if n.startswith(prefix)}
    return {**(unknown if source.format is target else {}), **back}
