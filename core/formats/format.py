"""A format: where the files of a system hold their tensors, and under which names.

Each format is one module with one ``FORMAT``. Its tables are made of ``rules.Rule``; reading and
writing both follow them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from triptych.core.config.spec import RunSpec, VitSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.files.tree import Content, Node, Record, Stored
from triptych.core.formats.arithmetic import Arithmetic
from triptych.core.formats.changes import Facts
from triptych.core.formats.moments import Moments
from triptych.core.formats.rules import Table, fits
from triptych.core.parameters import table

WRAPPER = "module."
"""Prefix of the names of a model that was saved inside a data-parallel wrapper."""

Kind = Literal["pretraining", "encoder", "linear probe", "classifier", "distilled", "any"]


@dataclass(frozen=True)
class Layout:
    """One way in which a system names the tensors of a network.

    Attributes:
        about: what such a file holds, for messages, e.g. "MoCo v2 pretraining".
        kind: of the network. "distilled" is a ViT with a second token; "any" is for canonical
            names.
        table: the rules.
        marks: templates of names of which a file must have at least one.
        methods: names of the methods whose states can be written so.
        encoder: kind of the encoder, "" for both.
        beside: templates of names in such files that have no canonical twin.
        order: beginnings of names, in the order of the system's own model. Its optimizer may number
            the parameters in that order.
    """

    about: str
    kind: Kind
    table: Table
    marks: tuple[str, ...]
    methods: tuple[str, ...] = ()
    encoder: Literal["", "vit", "resnet"] = ""
    beside: tuple[str, ...] = ()
    order: tuple[str, ...] = ()

    def ordered(self, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
        """The tensors in the order of the system's own model."""

        def place(name: str) -> int:
            found = (i for i, start in enumerate(self.order) if name.startswith(start))
            return next(found, len(self.order))

        return {name: tensors[name] for name in sorted(tensors, key=place)}

    def holds(self, spec: RunSpec) -> bool:
        """Whether the state of a run can be written so."""
        encoder = "vit" if isinstance(spec.model, VitSpec) else "resnet"
        return spec.method.name in self.methods and self.encoder in ("", encoder)


class Place(NamedTuple):
    """A state dict in a file.

    Attributes:
        name: where it is, e.g. "state_dict".
        tensors: by name. A wrapper's prefix is removed if all names have it.
        average: whether the weights are a moving average of the trained ones.
        wrapped: whether a prefix was removed.
    """

    name: str
    tensors: dict[str, Stored]
    average: bool = False
    wrapped: bool = False


TOP = "the top level"
PLAIN = ("state_dict", "model", "module", "target_encoder", "model.pdparams", "model.safetensors",
         "pytorch_model.bin")  # fmt: skip
"""Keys under which files and folders hold a state dict. The last three are names of files."""
AVERAGED = ("state_dict_ema", "model_ema")
"""Keys under which files hold averaged weights."""


def places(content: Content) -> Iterator[Place]:
    """The state dicts under the usual keys and at the top level."""
    tree = content.tree if isinstance(content.tree, dict) else {}
    # A folder of Hugging Face may have the same weights twice.
    twice = {"pytorch_model.bin"} if "model.safetensors" in tree else set()
    for key in (*PLAIN, *AVERAGED):
        if key not in twice and (found := tensors_of(tree.get(key))):
            yield place(key, found, average=key in AVERAGED)
    # A number beside the state dict, such as the best accuracy, has a name without a dot.
    flat = tensors_of(tree)
    if any("." in name for name in flat) or (flat and content.container in ("npz", "safetensors")):
        yield place(TOP, flat)


def place(name: str, tensors: dict[str, Stored], *, average: bool = False) -> Place:
    """A state dict without the prefix of a wrapper."""
    wrapped = bool(tensors) and all(name.startswith(WRAPPER) for name in tensors)
    if wrapped:
        tensors = {key.removeprefix(WRAPPER): tensor for key, tensor in tensors.items()}
    return Place(name, tensors, average, wrapped)


def tensors_of(node: Node) -> dict[str, Stored]:
    """The tensors directly in a dictionary. Other entries are no weights."""
    if not isinstance(node, dict) or isinstance(node, Record):
        return {}
    return {str(name): value for name, value in node.items() if isinstance(value, Stored)}


def no_fault(content: Content) -> str:
    """Nothing is known that could be wrong with a file."""
    return ""


def no_facts(content: Content) -> Facts:
    """The facts of a file that says nothing about its model but names and shapes."""
    return {}


def epochs(content: Content) -> int | None:
    """The number of whole epochs behind the state, under the key "epoch"; None: not known."""
    found = content.tree.get("epoch") if isinstance(content.tree, dict) else None
    return found if isinstance(found, int) and found >= 0 else None


@dataclass(frozen=True)
class Output:
    """What is written.

    Attributes:
        layout: of the names.
        tensors: by name in the file, in the order of ``Layout.ordered``.
        optimizer: canonical names of the optimizer's entries -> values; empty: none.
        spec: of the run.
        step: number of updates, if it is known.
        epoch: number of whole epochs done, 0 if it is not known.
        folder: whether the destination is a folder, where a format has both files and folders.
    """

    layout: Layout
    tensors: dict[str, Stored]
    optimizer: dict[str, Stored]
    spec: RunSpec
    step: int | None = None
    epoch: int = 0
    folder: bool = False


@dataclass(frozen=True)
class Format:
    """The files of one system.

    Attributes:
        name: for ``--from`` and ``--to``.
        about: the system, in one line.
        layouts: the ways in which it names tensors.
        keys: entries beside the state dict that such files have. The more of them a file has, the
            better is the claim.
        places: finds the state dicts in a file.
        containers: those that no other format has. There its claim counts before equal ones.
        facts: reads facts about the model from the file's own meta data.
        constants: facts that hold for all models of the system, such as the epsilon of its norms.
        remarks: lines about ``constants`` that may be otherwise in a run that goes on.
        arithmetic: how the system computes the encoders in its files, for the self-check of a
            converter.
        moments: how its files hold the state of an optimizer; None: they hold none.
        epochs: reads the number of whole epochs behind a training state.
        fault: why a file of this format must not be used, in a line; "": no reason.
        output: (container, tree) of a file; None: the format is only read.
    """

    name: str
    about: str
    layouts: tuple[Layout, ...]
    keys: frozenset[str] = frozenset()
    places: Callable[[Content], Iterator[Place]] = places
    containers: tuple[str, ...] = ()
    facts: Callable[[Content], Facts] = no_facts
    constants: Facts = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    arithmetic: tuple[Arithmetic, ...] = ()
    moments: Moments | None = None
    epochs: Callable[[Content], int | None] = epochs
    fault: Callable[[Content], str] = no_fault
    output: Callable[[Output], tuple[str, Node]] | None = None

    def layout(self, spec: RunSpec) -> Layout:
        """The layout that holds the state of a run.

        Raises:
            UserError: there is none.
        """
        for layout in self.layouts:
            if layout.holds(spec):
                return layout
        methods = dict.fromkeys(name for layout in self.layouts for name in layout.methods)
        raise UserError(
            f"method.name: {spec.method.name}: files of {self.about} hold "
            f"{' or '.join(methods) or 'no training state'}"
        )

    def names(self, spec: RunSpec) -> dict[str, str]:
        """The name in a file of each canonical tensor of a run that the format holds.

        A tensor that the file has in parts has the name of the first one.
        """
        known = self.layout(spec).table
        found = {param.name: known.theirs(param.name) for param in table(spec)}
        return {ours: theirs[0][0] for ours, theirs in found.items() if theirs}

    def to_canonical(self, arrays: State, spec: RunSpec) -> State:
        """Arrays under canonical names. What no rule names keeps its name."""
        known = self.layout(spec).table
        renamed = known.to_canonical(_stored(arrays), facts_of(spec))
        both = {**renamed.tensors, **renamed.unknown}
        return {name: np.asarray(tensor.array()) for name, tensor in both.items()}

    def from_canonical(self, state: State, spec: RunSpec) -> State:
        """The arrays of a state under the format's names, without what it cannot hold.

        Raises:
            KeyError: the state lacks a tensor of the model.
        """
        names = self.names(spec)
        known = self.layout(spec).table
        chosen = _stored({ours: state[ours] for ours in names})
        written, _ = known.from_canonical(chosen, facts_of(spec))
        return {name: np.asarray(tensor.array()) for name, tensor in written.items()}


def facts_of(spec: RunSpec) -> Facts:
    """What a spec says about a model."""
    model = spec.model
    return {f"model.{key}": value for key, value in model.model_dump().items()}


def _stored(arrays: State) -> dict[str, Stored]:
    return {name: Stored.of(np.asarray(array)) for name, array in arrays.items()}


class Claim(NamedTuple):
    """How well a layout explains a state dict. Claims are compared in the order of the fields.

    Attributes:
        explained: fraction of the tensors that have a canonical name or stand in ``beside``.
        home: whether the file has a container of this format alone.
        evidence: number of typical entries beside the state dict.
    """

    explained: float
    home: bool
    evidence: int


def claim(found: Format, layout: Layout, content: Content, spot: Place) -> Claim | None:
    """The claim of a format's layout on a state dict; None if it is not of this layout."""
    names = spot.tensors.keys()
    if not any(fits(mark, name) for mark in layout.marks for name in names):
        return None
    known = sum(
        bool(layout.table.names(name)) or any(fits(b, name) for b in layout.beside)
        for name in names
    )
    top = content.tree.keys() if isinstance(content.tree, dict) else ()
    home = content.container in found.containers
    return Claim(known / len(names), home, len(found.keys & set(top)))
