"""Loads weights in any known format.

A format is a module with the functions of ``Format``. It derives its table of names from the table
of parameters, and inverts it for the other direction, so both directions always agree.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from triptych.core.checkpoint.manifest import Manifest, other_architecture
from triptych.core.checkpoint.retrieval import MANIFEST, latest, read
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.files.arrays import read_file
from triptych.core.formats import checks, containers, moca, moco, moco_v3, plain
from triptych.core.formats.encoders import Encoders
from triptych.core.parameters import Param, table

BRANCHES = ("student.", "teacher.", "memory.", "optimizer.")
"""Prefixes of canonical names."""

OWN = "canonical"
"""Name of our own format."""

DETECTOR = ("fpn", "rpn", "roi_head", "bbox_head", "mask_head", "proposal_generator")
"""Parts of the names of a detector's tensors."""

OPTIONAL = "optimizer."
"""Prefix of the optimizer's state, which a file may lack. Only the backend knows its entries."""

SHOWN = 8
"""Number of lines printed for each kind of problem."""


class Format(Protocol):
    """The names and layouts of foreign files.

    Attributes:
        ENCODERS: where such a file holds its encoders.
    """

    ENCODERS: Encoders

    def matches(self, names: Collection[str], /) -> bool:
        """Whether a file with these names has this format."""

    def to_canonical(self, arrays: State, spec: RunSpec, /) -> State:
        """The arrays with canonical names and layouts. An unknown array keeps its name."""

    def from_canonical(self, state: State, spec: RunSpec, /) -> State:
        """The state with the format's names and layouts."""


FORMATS: dict[str, Format] = {"moco": moco, "moco_v3": moco_v3, "moca": moca, "plain": plain}


def load_weights(path: Path, spec: RunSpec) -> State:
    """The complete weights of the model of ``spec``, with the dtypes of the file.

    Args:
        path: a checkpoint or run folder, or a file or folder as in ``containers``. The names are
            canonical or those of a foreign format.
        spec: of the run.

    Returns:
        The tensors of ``core.parameters.table(spec)`` in its order, then the optimizer's entries of
        the file.

    Raises:
        UserError: the file is unreadable or has another architecture; or a tensor is missing,
            superfluous, misshapen or not finite. There is one line for each such tensor.
    """
    manifest, arrays = read_weights(path)
    state = to_canonical(arrays, spec, path)
    problems = mismatches(state, table(spec))
    if manifest:
        _check_checkpoint(manifest, spec, path, fits=not problems)
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    required = [param.name for param in table(spec)]
    optional = [name for name in state if name.startswith(OPTIONAL)]
    return {name: state[name] for name in [*required, *optional]}


def _check_checkpoint(manifest: Manifest, spec: RunSpec, path: Path, *, fits: bool) -> None:
    """Refuses a checkpoint of another model, or one whose equal shapes mean something else.

    Args:
        fits: whether the tensors have the names and shapes of the model.
    """
    remedy = "give -c the spec.yaml of its run"
    then = manifest.spec.get("method", {}).get("name")
    if then != spec.method.name:
        raise UserError(
            f"{path}: a checkpoint of method {then}, and the recipe has method {spec.method.name}; "
            f"{remedy}"
        )
    if other := other_architecture(manifest, spec, shapes=not fits):
        raise UserError(f"{path}: a checkpoint of another architecture: {other}; {remedy}")


def read_arrays(path: Path) -> State:
    """The named arrays of an npz or safetensors file, or of a checkpoint or run folder.

    Raises:
        UserError: the path is none of these, is damaged, or holds other data than numbers.
    """
    return _read_checkpoint(path)[1] if path.is_dir() else read_file(path)


def to_canonical(arrays: State, spec: RunSpec, path: Path) -> State:
    """The arrays under canonical names. Their names tell the format.

    Args:
        arrays: in any known format.
        spec: of the run.
        path: of the file, for messages.

    Raises:
        UserError: the format is unknown, or belongs to another method.
    """
    name = format_of(arrays, path)
    if name == OWN:
        return arrays
    try:
        return FORMATS[name].to_canonical(arrays, spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def format_of(names: Collection[str], path: Path) -> str:
    """The format of a file with these names: ``OWN``, or a key of ``FORMATS``.

    Raises:
        UserError: the format is unknown.
    """
    if any(name.startswith(BRANCHES) for name in names):
        return OWN
    for name, foreign in FORMATS.items():
        if foreign.matches(names):
            return name
    if detector := next((n for n in names if any(part in n for part in DETECTOR)), None):
        raise UserError(f"{path}: holds a detector ({detector}), not an encoder or classifier")
    first_names = ", ".join(list(names)[:3]) or "nothing"
    raise UserError(
        f"{path}: holds {first_names}: names of no known format ({OWN}, {', '.join(FORMATS)})"
    )


def mismatches(state: State, table: Sequence[Param]) -> list[str]:
    """The problems that make a state unusable for these parameters, one line per tensor."""
    params = {param.name: param for param in table}
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
        *_capped("unusable", list(checks.faults(state, table))),
        *_capped("not finite:", [n for n, a in state.items() if not np.isfinite(a).all()]),
    ]


def _capped(kind: str, problems: list[str]) -> list[str]:
    lines = [f"{kind} {problem}" for problem in problems[:SHOWN]]
    more = len(problems) - len(lines)
    return [*lines, f"{kind}: {more} more"] if more else lines


def read_weights(path: Path) -> tuple[Manifest | None, State]:
    """The arrays of a checkpoint or run folder, or of a file or folder of any system.

    Returns:
        The manifest if there is one, and the arrays.

    Raises:
        UserError: the path is none of these or is damaged, or holds no state dict or several.
    """
    if path.is_dir() and not containers.is_foreign_folder(path):
        return _read_checkpoint(path)
    return None, containers.read_state_dict(path)


def _read_checkpoint(path: Path) -> tuple[Manifest, State]:
    """Manifest and arrays of a checkpoint, or of the newest one of a run."""
    if (path / MANIFEST).exists():
        return read(path)
    messages: list[str] = []
    checkpoint = latest(path, messages.append)
    if checkpoint is None:
        raise UserError("\n".join([f"{path}: holds no whole checkpoint", *messages]))
    return read(checkpoint)
