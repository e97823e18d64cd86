"""The state of an optimizer in the files of other systems.

A file links a moment to its parameter in one of two ways:

    by number: PyTorch, OneFlow and LiBai number the parameters in the order of the optimizer's
        groups. The file does not say which tensor has which number: ``Moments.groups`` does. A
        frozen tensor may have a number without having moments.
    by name: Paddle gives each parameter a unique name, which the file links to a tensor.

The values of a moment are arranged as those of its parameter, so they change by the same rule.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from triptych.core.config.spec import AdamWSpec, LarsSpec, RunSpec
from triptych.core.contracts import Array
from triptych.core.files.tree import Content, Malformed, Node, Stored
from triptych.core.formats.changes import Facts
from triptych.core.formats.entries import Entries, Key, entries
from triptych.core.formats.rules import Renamed, Table, fits
from triptych.core.optim import scaling, schedules

KINDS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "lars": ("momentum_buffer",),
}
"""Canonical kinds of moments, by the name of the optimizer."""
STEP = "optimizer.step"
"""Canonical name of the number of updates."""
COUNTS = (STEP, *scaling.ENTRIES)
"""Canonical names of the entries that belong to no tensor: whole numbers."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "_mean", "_variance")
"""Last words of the names of a batch norm's statistics."""
MARKS = {"betas": "adamw", "trust_coefficient": "lars", "eta": "lars", "momentum": "sgd"}
"""The optimizer that has a hyper-parameter. The first that a group has counts."""
UNLIKE = {"amsgrad": False, "nesterov": False, "dampening": 0, "maximize": False}
"""Hyper-parameters whose other values no optimizer here has."""


class Parameter(NamedTuple):
    """A parameter of the model in a file.

    Attributes:
        name: in the file.
        ours: canonical name; "" if it has none.
        shape: in the file.
    """

    name: str
    ours: str
    shape: tuple[int, ...]


Groups = Callable[[Sequence[Parameter]], Sequence[Sequence[Parameter]]]
"""Gives the parameters of an optimizer's groups, from all of the model in its own order."""


def one_group(params: Sequence[Parameter]) -> Sequence[Sequence[Parameter]]:
    """One group of all parameters, the frozen ones included."""
    return [params]


def torch_options(spec: RunSpec, group: int) -> dict[str, Node]:
    """The hyper-parameters of any group under PyTorch's names. A program that resumes sets the
    learning rate itself; here it is the peak.
    """
    optim = spec.optim
    lr = schedules.scaled_lr(optim.lr, spec.train.batch_size, optim.scale_lr_by)
    found: dict[str, Node] = {"lr": lr, "weight_decay": optim.weight_decay}
    if isinstance(optim, AdamWSpec):
        return {**found, "betas": optim.betas, "eps": optim.eps, "amsgrad": False}
    found["momentum"] = optim.momentum
    if isinstance(optim, LarsSpec):
        return {**found, "trust_coefficient": optim.trust_coefficient}
    return {**found, "dampening": 0, "nesterov": False}


def optimizer_entry(content: Content) -> Node:
    """The entry under the key "optimizer"."""
    return content.tree.get("optimizer") if isinstance(content.tree, dict) else None


@dataclass(frozen=True)
class Moments:
    """How the files of a system hold the state of an optimizer.

    Attributes:
        optimizers: name of our optimizer -> kinds of its moments in the files, in the order of
            ``KINDS``. The files hold no other optimizer.
        find: the entry of a file that holds the state.
        groups: the parameters with a number. Links by name do not need it.
        link: how a written file links moments to parameters. "name": as "number", with unique names
            as keys. "flat": one dictionary, whose keys are made of unique name and kind.
        step: how a written file holds the number of updates: a float32 scalar of each parameter, an
            integer of each parameter, or one integer for all, under "step".
        options: hyper-parameters of the group with this position, for a written file.
        form: of LARS in the files, as in ``LarsSpec.form``.
        scale: finds the loss scale of a file, by canonical name, and notes about it; None: the
            files hold none.
        frozen: templates of parameters that may have no number. Of these, a file numbers none, or
            leaves out those of the first templates.
    """

    optimizers: Mapping[str, tuple[str, ...]]
    find: Callable[[Content], Node] = optimizer_entry
    groups: Groups = one_group
    link: Literal["number", "name", "flat"] = "number"
    step: Literal["tensor", "integer", "shared"] = "tensor"
    options: Callable[[RunSpec, int], dict[str, Node]] = torch_options
    form: str = "moco_v3"
    scale: Callable[[Content], tuple[Mapping[str, int], Sequence[str]]] | None = None
    frozen: tuple[str, ...] = ()

    def holds(self, name: str) -> bool:
        """Whether the files have a place for an entry of ``core.optim.scaling``."""
        return self.scale is not None and name in (scaling.SCALE, scaling.GOOD_STEPS)


class Options(NamedTuple):
    """Hyper-parameters of a group, as the file has them.

    Attributes:
        values: by name.
        params: canonical names of its parameters that have one.
    """

    values: Mapping[str, Node]
    params: tuple[str, ...]


@dataclass(frozen=True)
class Optimizer:
    """The state of an optimizer, read from a file.

    Attributes:
        name: of our optimizer, e.g. "sgd".
        tensors: moments and number of updates, by canonical name.
        options: of the groups. Paddle's own state has none.
        form: of LARS, as in ``LarsSpec.form``.
        notes: what of the state is not taken, and why.
    """

    name: str
    tensors: dict[str, Stored] = field(default_factory=dict)
    options: tuple[Options, ...] = ()
    form: str = "moco_v3"
    notes: tuple[str, ...] = ()


def in_form(moment: Stored, before: str, after: str, lr: Node) -> Stored:
    """The momentum of LARS in another form. That of mmpretrain has the learning rate as a factor.

    Args:
        moment: momentum buffer.
        before: its form, as in ``LarsSpec.form``.
        after: the wanted form.
        lr: learning rate of the last update.

    Raises:
        Malformed: the learning rate is not known.
    """
    if before == after:
        return moment
    if not isinstance(lr, int | float) or not lr > 0:
        raise Malformed(f"the momentum of LARS in the form {before} needs the rate, which is {lr}")
    factor = lr if after == "mmpretrain" else 1.0 / lr

    def bits() -> Array:
        return moment.array().astype(np.float64) * factor

    return Stored("float64", moment.shape, bits, verify=moment.verify)


def parameters(tensors: Mapping[str, Stored], ours: Mapping[str, str]) -> list[Parameter]:
    """The parameters among the tensors of a model, without buffers.

    Args:
        tensors: by name in the file, in the order of the file.
        ours: canonical name of each tensor that has one, by name in the file.
    """
    return [
        Parameter(name, ours.get(name, ""), tensor.shape)
        for name, tensor in tensors.items()
        if not _is_buffer(name, ours.get(name, ""), tensor)
    ]


def _is_buffer(name: str, ours: str, tensor: Stored) -> bool:
    words = (name.rpartition(".")[2], ours.rpartition(".")[2])
    return (
        tensor.dtype.startswith(("int", "uint", "bool"))
        or ours.startswith("memory.")
        or any(word in STATISTICS for word in words)
    )


def read(
    moments: Moments,
    content: Content,
    tensors: Mapping[str, Stored],
    renamed: Renamed,
    table: Table,
    facts: Facts,
) -> Optimizer | None:
    """The state of the optimizer in a file; None if the file has none.

    Args:
        moments: of the file's format.
        content: of the file.
        tensors: of the model, by name in the file, in the order of the file.
        renamed: the same tensors under canonical names.
        table: of the names.
        facts: about the model.

    Raises:
        Malformed: the state is not that of an optimizer of this model.
        UserError: a change of values needs a fact that is not known.
    """
    found = entries(moments.find(content))
    if found is None:
        return None
    ours = {theirs: name for name, parts in renamed.origin.items() for theirs in parts}
    params = parameters(tensors, ours)
    linked = _linked(found, moments, params, tensors)
    name = _name(found, moments)
    if len(found.steps) > 1:
        counts = ", ".join(map(str, sorted(found.steps)))
        raise Malformed(f"optimizer: its parameters have different numbers of updates: {counts}")
    state: dict[str, Stored] = {}
    notes = list(_notes(found, moments.optimizers[name]))
    for theirs, kind in zip(moments.optimizers[name], KINDS[name], strict=True):
        values = _values(found, theirs, linked)
        canonical = table.to_canonical(values, facts)
        state |= {f"optimizer.{kind}.{ours}": t for ours, t in canonical.tensors.items()}
        notes += [f"{theirs} of {lost}: it is no tensor here" for lost in canonical.unknown]
    if found.steps:
        state[STEP] = Stored.of(np.asarray(found.steps.pop(), np.int64))
    if state and moments.scale:
        scale, remarks = moments.scale(content)
        state |= {n: Stored.of(np.asarray(value, np.int64)) for n, value in scale.items()}
        notes += remarks
    options = tuple(
        Options(group.options, tuple(linked[k].ours for k in group.keys if k in linked))
        for group in found.groups
    )
    return Optimizer(name, state, options, moments.form, tuple(notes))


def _linked(
    found: Entries, moments: Moments, params: Sequence[Parameter], tensors: Mapping[str, Stored]
) -> dict[Key, Parameter]:
    """The parameter of each key."""
    keys = [key for group in found.groups for key in group.keys]
    used = [key for values in found.moments.values() for key in values]
    if all(isinstance(key, int) for key in [*keys, *used]):
        numbered = _numbered(moments, params, len(keys))
        if len(keys) != len(numbered):
            raise Malformed(
                f"optimizer: it numbers {len(keys)} parameters, the model has {len(numbered)}"
            )
        linked: dict[Key, Parameter] = dict(zip(keys, numbered, strict=True))
    else:
        linked = {tensors[param.name].unique: param for param in params}
    # A key may be 0 or empty.
    if lost := [key for key in used if key not in linked]:
        raise Malformed(f"optimizer: {lost[0]!r} is the key of no parameter of the model")
    return linked


def _numbered(moments: Moments, params: Sequence[Parameter], count: int) -> list[Parameter]:
    """The parameters with a number: all, or those without frozen ones if that gives the count."""
    every = [param for group in moments.groups(params) for param in group]
    for last in range(len(moments.frozen) + 1):
        out = moments.frozen[:last]
        found = [p for p in every if not any(fits(template, p.name) for template in out)]
        if len(found) == count:
            return found
    return every


def _name(found: Entries, moments: Moments) -> str:
    """The name of our optimizer that has these hyper-parameters or, without any, these moments."""
    options = found.groups[0].options if found.groups else {}
    name = next((MARKS[key] for key in MARKS if key in options), None)
    if name is None:
        kinds = found.moments.keys()
        fit = (name for name, theirs in moments.optimizers.items() if kinds >= set(theirs))
        name = next(fit, None)
    if name is None or name not in moments.optimizers:
        what = ", ".join(found.moments) or "no moments"
        known = " or ".join(moments.optimizers)
        raise Malformed(f"optimizer: {what}; expected the state of {known}")
    return name


def _values(found: Entries, kind: str, linked: Mapping[Key, Parameter]) -> dict[str, Stored]:
    """The moments of one kind, by the name of their parameter in the file."""
    values = {}
    for key, moment in found.moments.get(kind, {}).items():
        param = linked[key]
        if moment.shape != param.shape:
            raise Malformed(
                f"optimizer: {kind} of {key!r} has the shape {moment.shape}, its parameter "
                f"{param.name} {param.shape}"
            )
        values[param.name] = replace(moment, unique="")
    return values


def _notes(found: Entries, kinds: Sequence[str]) -> Iterator[str]:
    """What an optimizer here does not have."""
    for kind, values in found.moments.items():
        if kind not in kinds:
            yield f"{kind} of {len(values)} parameters: no optimizer here has it"
    options: Mapping[str, Node] = found.groups[0].options if found.groups else {}
    if found.steps and not found.groups:
        yield "betas: Paddle's state holds their powers only; 0.9 and 0.999 are taken"
    for key, plain in UNLIKE.items():
        if options.get(key, plain) not in (plain, None):
            yield f"{key} {options[key]}: no optimizer here has it; training goes on without it"
