"""The names of the official MoCo v1 and v2 release (facebookresearch/moco).

Its encoders are torchvision's, as ours are, with the head in the place of the classifier: ``fc``
in v1, ``fc.0`` and ``fc.2`` in v2. Values and layouts are equal, but for the queue's pointer,
which is a vector of one there.
"""

from collections.abc import Collection

import numpy as np

from triptych.core.config.spec import MocoV1Spec, QueueSpec, RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats.wrapper import WRAPPER, unwrapped
from triptych.core.parameters import table

BRANCHES = {"student": "encoder_q", "teacher": "encoder_k"}
"""Canonical -> official."""
MEMORY = {"memory.queue": "queue", "memory.pointer": "queue_ptr"}


def matches(names: Collection[str]) -> bool:
    """Whether the names of a file are official ones."""
    prefixes = tuple(f"{branch}." for branch in BRANCHES.values())
    return any(name.removeprefix(WRAPPER).startswith(prefixes) for name in names)


def names(spec: RunSpec) -> dict[str, str]:
    """Canonical -> official name of each tensor.

    Raises:
        UserError: the method is neither v1 nor v2.
    """
    if not isinstance(spec.method, QueueSpec):
        raise UserError(
            f"method.name: {spec.method.name}: official MoCo v1 and v2 names need moco_v1 or v2"
        )
    head = "fc." if isinstance(spec.method, MocoV1Spec) else "fc.{}."
    renamed = {}
    for param in table(spec):
        branch, _, rest = param.name.partition(".")
        part, _, rest = rest.partition(".")
        if part == "projector":
            layer, _, end = rest.partition(".")
            rest = head.format(layer) + end
        renamed[param.name] = MEMORY.get(param.name) or f"{BRANCHES[branch]}.{rest}"
    return renamed


def to_canonical(arrays: State, spec: RunSpec) -> State:
    """Renames what has an official name; anything else keeps its own, to be reported as unused."""
    canonical = {official: name for name, official in names(spec).items()}
    found = {canonical.get(name, name): array for name, array in unwrapped(arrays).items()}
    pointer = found.get("memory.pointer")
    if pointer is not None and pointer.shape == (1,):
        found["memory.pointer"] = pointer.reshape(())
    return found


def from_canonical(state: State, spec: RunSpec) -> State:
    """The official state dict, unwrapped. Optimizer entries have no place in it.

    Raises:
        KeyError: a tensor of the model is not in the state.
    """
    found = {official: state[name] for name, official in names(spec).items()}
    return {**found, "queue_ptr": np.reshape(found["queue_ptr"], 1)}
