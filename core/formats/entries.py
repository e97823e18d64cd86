"""The state of an optimizer as a file holds it, before its parameters are known.

Two shapes are read:

    PyTorch's, also of OneFlow, LiBai, mmengine and PLSC: ``{"state": {key: {kind: tensor}},
        "param_groups": [{"params": [key, ...], ...}]}``. The keys are numbers or unique names.
    Paddle's: ``{"<unique name>_<kind>_0": tensor}``.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from triptych.core.files.tree import Malformed, Node, Stored, tensors

Key = int | str
"""Number or unique name of a parameter."""
FLAT = re.compile(r"(?P<key>.+)_(?P<kind>velocity|moment[12]|beta[12]_pow_acc)_\d+")
"""A name in Paddle's state."""
BETAS = {"beta1_pow_acc": 0.9, "beta2_pow_acc": 0.999}
"""The betas with which a number of updates must explain Paddle's powers, by their kind."""


class Group(NamedTuple):
    """A parameter group.

    Attributes:
        options: its hyper-parameters.
        keys: its parameters.
    """

    options: Mapping[str, Node]
    keys: tuple[Key, ...]


@dataclass
class Entries:
    """The state of an optimizer.

    Attributes:
        moments: kind -> key -> moment.
        steps: the numbers of updates that the state holds, which should be one.
        groups: Paddle's own state has none.
    """

    moments: dict[str, dict[Key, Stored]] = field(default_factory=dict)
    steps: set[int] = field(default_factory=set)
    groups: tuple[Group, ...] = ()


def entries(node: Node) -> Entries | None:
    """The entries of an optimizer's state; None if the node is none.

    Raises:
        Malformed: the state has another form than its shape promises.
    """
    if not isinstance(node, dict):
        return None
    if isinstance(node.get("state"), dict) and isinstance(node.get("param_groups"), list):
        return _grouped(node["state"], node["param_groups"])
    flat = {match: t for name, t in tensors(node) if (match := FLAT.fullmatch(name))}
    if not flat:
        return None
    found = Entries()
    for match, tensor in flat.items():
        found.moments.setdefault(match["kind"], {})[match["key"]] = tensor
    powers = {kind: found.moments.pop(kind) for kind in BETAS if kind in found.moments}
    found.steps = _steps(powers)
    return found


def _grouped(state: Mapping[Key, Node], groups: list[Node]) -> Entries:
    found = Entries(groups=tuple(map(_group, groups)))
    for key, value in state.items():
        if key == "step":
            found.steps.add(_count(value))
            continue
        if not isinstance(value, dict):
            raise Malformed(f"the optimizer's entry {key!r} holds no moments")
        for kind, moment in value.items():
            if kind == "step":
                found.steps.add(_count(moment))
            elif isinstance(moment, Stored):
                found.moments.setdefault(kind, {})[key] = moment
    return found


def _group(node: Node) -> Group:
    keys = node.get("params") if isinstance(node, dict) else None
    if not isinstance(keys, list | tuple) or not all(isinstance(key, int | str) for key in keys):
        raise Malformed("a parameter group of the optimizer names no parameters")
    options = {key: value for key, value in node.items() if key not in ("params", "_options")}
    more = node.get("_options") or {}
    if not isinstance(more, dict):
        raise Malformed("a parameter group of the optimizer has _options that are no dictionary")
    return Group({**options, **more}, tuple(keys))


def _count(node: Node) -> int:
    """The number of updates: an integer, or a tensor with one value, which may be a float."""
    value = node
    if isinstance(node, Stored):
        values = node.array()
        value = values.reshape(-1)[0].item() if values.size == 1 else None
    if not isinstance(value, int | float) or not math.isfinite(value) or value != int(value):
        raise Malformed(f"the optimizer's number of updates is {value!r}")
    return int(value)


def _steps(powers: Mapping[str, Mapping[Key, Stored]]) -> set[int]:
    """The numbers of updates that explain Paddle's powers of the betas.

    The power before the first update is the beta itself. A power that has become 0 says nothing.
    """
    steps = set()
    for kind, beta in BETAS.items():
        for tensor in powers.get(kind, {}).values():
            values = tensor.array().reshape(-1)
            if values.size != 1 or values.dtype.kind != "f":
                raise Malformed(f"the optimizer's {kind} is no number, but of shape {tensor.shape}")
            power = float(values[0])
            if 0 < power <= beta:
                steps.add(round(math.log(power) / math.log(beta)) - 1)
    return steps
