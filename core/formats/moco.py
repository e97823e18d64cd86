"""The names of the official MoCo v1 and v2 release (facebookresearch/moco).

Both encoders have torchvision's names, as the canonical ones do. The head has the name of the
classifier: ``fc`` in v1, ``fc.0`` and ``fc.2`` in v2. Values and layouts are equal to ours, except
that the queue's pointer is a vector of length 1.
"""

from collections.abc import Collection

import numpy as np

from triptych.core.config.spec import MocoV1Spec, QueueSpec, RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.formats.encoders import Encoders
from triptych.core.formats.wrapper import WRAPPER, unwrapped
from triptych.core.parameters import table

BRANCHES = {"student": "encoder_q", "teacher": "encoder_k"}
"""Maps canonical to official prefixes."""
MEMORY = {"memory.queue": "queue", "memory.pointer": "queue_ptr"}
ENCODERS = Encoders(
    {branch: f"{official}." for branch, official in BRANCHES.items()},
    heads=("fc.",),
    others=tuple(MEMORY.values()),
)


def matches(names: Collection[str]) -> bool:
    """Whether the names of a file are official ones."""
    prefixes = tuple(f"{branch}." for branch in BRANCHES.values())
    return any(name.removeprefix(WRAPPER).startswith(prefixes) for name in names)


def names(spec: RunSpec) -> dict[str, str]:
    """The official name of each tensor, by canonical name.

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
    """Renames arrays with official names. The others keep theirs, and are reported as unused."""
    canonical = {official: name for name, official in names(spec).items()}
    state = {canonical.get(name, name): array for name, array in unwrapped(arrays).items()}
    pointer = state.get("memory.pointer")
    if pointer is not None and pointer.shape == (1,):
        state["memory.pointer"] = pointer.reshape(())
    return state


def from_canonical(state: State, spec: RunSpec) -> State:
    """The official state dict, without wrapper prefix and without the optimizer's entries.

    Raises:
        KeyError: the state lacks a tensor of the model.
    """
    arrays = {official: state[name] for name, official in names(spec).items()}
    return {**arrays, "queue_ptr": np.reshape(arrays["queue_ptr"], 1)}
