"""Recognises the format of a file of weights by the names and shapes of its tensors.

Every format claims the state dicts whose names its tables know. The claim that explains the most
tensors wins. No claim, or two equal ones with different meanings, is an error that lists what was
seen.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError, printable
from triptych.core.files.tree import Content, Malformed, Node, Stored
from triptych.core.formats import (
    canonical,
    deit,
    detectron2,
    huggingface,
    libai,
    lightly,
    mmpretrain,
    moca,
    moco,
    moco_v3,
    oneflow,
    paddle,
    paddlefleetx,
    passl,
    plsc,
    solo,
    timm,
    torch,
    torchvision,
    vissl,
)
from triptych.core.formats.architecture import contradiction
from triptych.core.formats.changes import Facts
from triptych.core.formats.entries import FLAT
from triptych.core.formats.format import PLAIN, Claim, Format, Layout, Place, claim, facts_of
from triptych.core.formats.moments import Optimizer, read
from triptych.core.formats.rules import COUNTER, Renamed

FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        canonical.FORMAT,
        torch.FORMAT,
        oneflow.FORMAT,
        paddle.FORMAT,
        torchvision.FORMAT,
        timm.FORMAT,
        deit.FORMAT,
        huggingface.FORMAT,
        detectron2.FORMAT,
        moco.FORMAT,
        moco_v3.FORMAT,
        moca.FORMAT,
        paddlefleetx.FORMAT,
        plsc.FORMAT,
        passl.FORMAT,
        libai.FORMAT,
        mmpretrain.FORMAT,
        solo.FORMAT,
        lightly.FORMAT,
        vissl.FORMAT,
    )
}
"""In the order in which equal claims with the same meaning count."""

ENOUGH = 0.5
"""Fraction of the tensors that a claim must explain."""

TOLD = ("model.heads", "model.layer_norm_eps")
"""Facts about an encoder that no shape shows."""

DETECTOR = ("fpn", "rpn", "roi_head", "bbox_head", "mask_head", "proposal_generator")
"""Parts of the names of a detector's tensors."""

OPTIMIZERS = (
    "param_groups", "StructuredToParameterName@@", "LR_Scheduler", "master_weights", "optimizer"
)  # fmt: skip
"""Keys of a file that holds the state of an optimizer alone."""

REMEDY = "tools/convert.py --list shows what is known; save such a state dict alone"
"""What to do about a file that no format claims."""

SHOWN = 8
"""Number of names that a message lists."""


@dataclass(frozen=True)
class Source:
    """A file whose format is known.

    Attributes:
        content: of the file.
        format: of the file.
        layout: of its names.
        place: where its state dict is.
        renamed: its tensors.
        facts: about the model, from the file and the format.
        trained: whether the state of the optimizer is wanted.
    """

    content: Content
    format: Format
    layout: Layout
    place: Place
    renamed: Renamed
    facts: Facts
    trained: bool = True

    @property
    def tensors(self) -> dict[str, Stored]:
        """The tensors by canonical name."""
        return self.renamed.tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by canonical name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def fresh(self) -> dict[str, Stored]:
        """Canonical tensors that no file of the format has, with the values that they start with.

        Paddle counts no batches in its batch norms. No arithmetic depends on the counters; they
        start at 0.
        """
        mean, table = "running_mean", self.layout.table
        norms = [n.removesuffix(mean) for n in self.tensors if n.endswith(mean)]
        zero = Stored.of(np.zeros((), np.int64))
        return {f"{norm}{COUNTER}": zero for norm in norms if COUNTER not in table.norms}

    @cached_property
    def optimizer(self) -> Optimizer | None:
        """The state of the optimizer of a pretraining; None if the format knows none in the file.

        Raises:
            UserError: the state does not fit the model, and it is wanted.
        """
        if self.format.moments is None or self.layout.kind != "pretraining":
            return None
        try:
            return read(
                self.format.moments,
                self.content,
                self.place.tensors,
                self.renamed,
                self.layout.table,
                self.facts,
            )
        except Malformed as error:
            if not self.trained:
                return None
            path = printable(str(self.content.path))
            raise UserError(
                f"{path}: {self.format.name}: {error}; to go on without it, convert the file with "
                "--parts encoder,heads"
            ) from error

    @property
    def branches(self) -> tuple[str, ...]:
        """The encoders of the file: "student", "teacher", both or none."""
        return tuple(
            branch
            for branch in ("student", "teacher")
            if any(name.startswith(f"{branch}.encoder.") for name in self.tensors)
        )

    def told(self, spec: RunSpec) -> list[tuple[str, Node, Node]]:
        """What the file says about its encoder, no shape shows, and a spec contradicts.

        Returns:
            Key of the spec, value of the file, value of the spec.
        """
        known, ours = {**self.format.constants, **self.format.facts(self.content)}, facts_of(spec)
        return [
            (key, known[key], ours[key])
            for key in TOLD
            if key in known and ours.get(key, known[key]) != known[key]
        ]

    def named(self, name: str) -> str:
        """The name in the file of a canonical tensor."""
        return self.renamed.origin[name][0]


@dataclass(frozen=True)
class _Candidate:
    """A layout that names tensors of a state dict.

    Attributes:
        renamed: the tensors, or why the layout cannot hold them.
        facts: about the model.
    """

    format: Format
    layout: Layout
    place: Place
    claim: Claim
    renamed: Renamed | str
    facts: Facts


def recognise(
    content: Content,
    *,
    wanted: str | None = None,
    average: bool | None = None,
    spec: RunSpec | None = None,
    facts: Facts | None = None,
) -> Source:
    """The format of a file, and its tensors under canonical names.

    Args:
        content: of the file.
        wanted: name of the only format to consider; None: all.
        average: whether to take averaged weights; None: the file has one kind.
        spec: of the run. It decides between layouts that explain the file equally well.
        facts: about the model. They count before those of the file.

    Raises:
        UserError: no format or several fit, the file has plain and averaged weights and ``average``
            is None, it has none of the kind that ``average`` names, a change of values needs a
            fact that is not known, or the file has a fault.
    """
    formats = FORMATS.values() if wanted is None else [_format(wanted)]
    try:
        found = [*_candidates(formats, content, facts or {})]
    except UserError as error:
        raise UserError(f"{printable(str(content.path))}: {error}") from error
    # What explains less of the file is no second choice.
    most = max((c.claim.explained for c in found), default=0.0)
    found = [c for c in found if c.claim.explained == most]
    chosen = _chosen(content, [c for c in found if not isinstance(c.renamed, str)], average, spec)
    if chosen is None or isinstance(chosen.renamed, str):
        raise UserError(_unknown(content, wanted, found))
    if fault := chosen.format.fault(content):
        raise UserError(f"{printable(str(content.path))}: {chosen.format.name}: {fault}")
    return Source(content, chosen.format, chosen.layout, chosen.place, chosen.renamed, chosen.facts)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"format {name!r}: unknown; known are {', '.join(FORMATS)}")
    return FORMATS[name]


def _candidates(formats: Iterable[Format], content: Content, facts: Facts) -> Iterator[_Candidate]:
    for found in formats:
        told = {key: value for key, value in found.facts(content).items() if _is_plain(value)}
        known = {**found.constants, **told, **facts}
        for spot in found.places(content):
            for layout in found.layouts:
                made = claim(found, layout, content, spot)
                if made and made.explained >= ENOUGH:
                    renamed = _renamed(layout, spot, known)
                    yield _Candidate(found, layout, spot, made, renamed, known)


def _is_plain(value: Node) -> bool:
    """Whether a file says a number, a word, or a few numbers. Other objects are no facts."""
    if isinstance(value, list | tuple):
        return len(value) <= 8 and all(isinstance(each, int | float) for each in value)
    return isinstance(value, int | float | str)


def _renamed(layout: Layout, spot: Place, facts: Facts) -> Renamed | str:
    """The tensors under canonical names, or what their shapes have that the layout excludes."""
    try:
        renamed = layout.table.to_canonical(spot.tensors, facts)
    except Malformed as error:
        return str(error)
    wrong = contradiction({name: tensor.shape for name, tensor in renamed.tensors.items()})
    if wrong is None:
        return renamed
    return f"{renamed.origin[wrong.name][0]} {wrong.reason}"


def _chosen(
    content: Content, spots: list[_Candidate], average: bool | None, spec: RunSpec | None
) -> _Candidate | None:
    """The best claim; None if there is none."""
    if not spots:
        return None
    best = max(spots, key=lambda c: c.claim).claim.explained
    # Container and evidence are the envelope of a system. They decide between equal names only.
    equal = [c for c in spots if c.claim.explained == best]
    most = max(c.claim for c in equal)
    equal = [c for c in equal if c.claim == most]
    if spec and any(c.layout.holds(spec) for c in equal):
        equal = [c for c in equal if c.layout.holds(spec)]
    kinds = {c.place.average for c in equal}
    if len(kinds) > 1 and average is None:
        names = ", ".join(dict.fromkeys(repr(c.place.name) for c in equal))
        raise UserError(
            f"{printable(str(content.path))}: {content.container}: plain and averaged weights, "
            f"{names}; say which: init.average or --average, true or false"
        )
    if average is not None:
        equal = [c for c in equal if c.place.average is average]
        if not equal:
            asked, there = ("averaged", "plain") if average else ("plain", "averaged")
            raise UserError(
                f"{printable(str(content.path))}: {content.container}: no {asked} weights, {there} "
                "ones alone; leave init.average or --average out"
            )
    first = equal[0]
    if other := next((c for c in equal if _differs(first, c)), None):
        both = " and ".join(
            f"{c.format.name} ({c.layout.about}, {c.place.name})" for c in (first, other)
        )
        raise UserError(
            f"{printable(str(content.path))}: {content.container}: fits {both} equally well; it "
            f"holds {_listed(first.place.tensors)}; name the format, or save the state dict that "
            "is meant alone"
        )
    return first


def _differs(a: _Candidate, b: _Candidate) -> bool:
    return a.layout.table is not b.layout.table or a.place.name != b.place.name


def _unknown(content: Content, wanted: str | None, found: list[_Candidate]) -> str:
    """The line for a file that no format claims."""
    path, container = printable(str(content.path)), content.container
    tree: Mapping[str, Node] = content.tree if isinstance(content.tree, dict) else {}
    spots = {spot.name: spot for known in FORMATS.values() for spot in known.places(content)}
    if not spots:
        what = next((key for key in OPTIMIZERS if key in tree), None)
        kind = f"an optimizer's state ({what}) and no weights; " if what else ""
        return (
            f"{path}: {container}: {kind}no state dict under {', '.join(PLAIN)} or at the top "
            f"level; it holds {_tree(content.tree)}; save the model's state dict alone"
        )
    names = [name for spot in spots.values() for name in spot.tensors]
    if detector := next((n for n in names if any(part in n for part in DETECTOR)), None):
        return f"{path}: holds a detector ({detector}), not an encoder or classifier"
    if found:
        reasons = dict.fromkeys(f"not {c.format.name}: {c.renamed}" for c in found)
        return f"{path}: {container}: {'; '.join(reasons)}; {REMEDY}"
    if all(map(FLAT.fullmatch, names)):
        return (
            f"{path}: holds the state of an optimizer ({_listed(names)}) and no weights; give the "
            "file of the model that was saved with it"
        )
    known = wanted or ", ".join(FORMATS)
    return f"{path}: holds {_listed(names)}: names of no known format ({known}); {REMEDY}"


def _listed(names: Iterable[str]) -> str:
    found = [printable(name[:60]) for name in names]
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return ", ".join([*found[:SHOWN], *more]) or "nothing"


def _tree(tree: Node) -> str:
    if isinstance(tree, dict):
        return _listed(map(str, tree))
    return "one tensor" if isinstance(tree, Stored) else f"a {type(tree).__name__}"
