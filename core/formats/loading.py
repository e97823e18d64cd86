"""Foreign formats, and weights in any of them.

A format is a module with the functions of ``Format``; its name table is derived from the table of
parameters and inverted mechanically, so both directions always agree.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import numpy as np

from triptych.core.checkpoint.manifest import Manifest, other_architecture
from triptych.core.checkpoint.retrieval import MANIFEST, latest, read
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.files.arrays import read_file
from triptych.core.formats import checks, moca, moco, moco_v3
from triptych.core.parameters import table

BRANCHES = ("student.", "teacher.", "memory.", "optimizer.")
"""How canonical names begin."""

OPTIONAL = "optimizer."
"""Weights may come with the optimizer's state; which entries, only the backend knows."""

SHOWN = 8
"""Lines printed of each kind of problem."""


class Format(Protocol):
    """Names and layouts of somebody else's files."""

    def matches(self, names: Collection[str], /) -> bool:
        """Whether a file with these names is of this format."""

    def to_canonical(self, arrays: State, spec: RunSpec, /) -> State:
        """Canonical names and layouts; what the format does not know keeps its name."""

    def from_canonical(self, state: State, spec: RunSpec, /) -> State:
        """The format's names and layouts."""


FORMATS: dict[str, Format] = {"moco": moco, "moco_v3": moco_v3, "moca": moca}


def load_weights(path: Path, spec: RunSpec) -> State:
    """Weights for the model of ``spec``, complete and of the right shapes, dtypes as in the file.

    Args:
        path: a checkpoint or run folder, or an npz or safetensors file with canonical names or
            those of a foreign format.

    Returns:
        The tensors of ``core.parameters.table(spec)``, in its order, then the optimizer's entries
        that the file holds.

    Raises:
        UserError: not readable, of another architecture, incomplete, not finite, or with anything
            left over; one line for each tensor concerned.
    """
    manifest, arrays = _read(path)
    state = to_canonical(arrays, spec, path)
    problems = mismatches(state, spec)
    if problems:
        other = manifest and other_architecture(manifest, spec)
        if other:
            raise UserError(f"{path}: a checkpoint of another architecture: {other}")
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    required = [param.name for param in table(spec)]
    optional = [name for name in state if name.startswith(OPTIONAL)]
    return {name: state[name] for name in [*required, *optional]}


def read_arrays(path: Path) -> State:
    """The named arrays of an npz or safetensors file, or of a checkpoint or run folder.

    Raises:
        UserError: none of these, damaged, or holding anything but numbers.
    """
    return _read(path)[1]


def to_canonical(arrays: State, spec: RunSpec, path: Path) -> State:
    """Arrays under canonical names, from whichever format their names are of.

    Raises:
        UserError: of none, or of another method's.
    """
    if any(name.startswith(BRANCHES) for name in arrays):
        return arrays
    for known in FORMATS.values():
        if known.matches(arrays):
            try:
                return known.to_canonical(arrays, spec)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
    some = ", ".join(list(arrays)[:3]) or "nothing"
    raise UserError(
        f"{path}: holds {some}: names of no known format (canonical, {', '.join(FORMATS)})"
    )


def mismatches(state: State, spec: RunSpec) -> list[str]:
    """What keeps a state from being the complete model of ``spec``: a line per tensor."""
    params = {param.name: param for param in table(spec)}
    common = [name for name in params if name in state]
    return [
        *_capped("missing", [f"{n} {params[n].shape}" for n in params if n not in state]),
        *_capped(
            "unused",
            [
                f"{n} {a.shape}"
                for n, a in state.items()
                if n not in params and not n.startswith(OPTIONAL)
            ],
        ),
        *_capped(
            "misshapen",
            [
                f"{n}: expected {params[n].shape}, got {state[n].shape}"
                for n in common
                if state[n].shape != params[n].shape
            ],
        ),
        *_capped(
            "unusable",
            [
                f"{n}: expected floating-point numbers, got {state[n].dtype}"
                for n in common
                if state[n].dtype.kind != "f" and params[n].init.kind != "count"
            ],
        ),
        *_capped("unusable", list(checks.faults(state, spec))),
        *_capped("not finite:", [n for n, a in state.items() if not np.isfinite(a).all()]),
    ]


def _capped(kind: str, found: list[str]) -> list[str]:
    lines = [f"{kind} {item}" for item in found[:SHOWN]]
    more = len(found) - len(lines)
    return [*lines, f"{kind}: {more} more"] if more else lines


def _read(path: Path) -> tuple[Manifest | None, State]:
    if not path.is_dir():
        return None, read_file(path)
    if (path / MANIFEST).exists():
        return read(path)
    messages: list[str] = []
    found = latest(path, messages.append)
    if found is None:
        raise UserError("\n".join([f"{path}: holds no whole checkpoint", *messages]))
    return read(found)
