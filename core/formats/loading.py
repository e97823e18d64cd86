"""Loads the weights of a run from a file of any known format."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from triptych.core.checkpoint.manifest import Manifest, other_architecture
from triptych.core.config.spec import RunSpec, SupervisedSpec
from triptych.core.contracts import Array, State
from triptych.core.errors import UserError, printable
from triptych.core.files.arrays import read_file
from triptych.core.files.copying import copied, copies
from triptych.core.files.tree import Malformed, Stored
from triptych.core.formats import canonical, checks, containers
from triptych.core.formats.architecture import encoder_shapes, other_encoder
from triptych.core.formats.changes import Facts
from triptych.core.formats.continuing import Say, training_state
from triptych.core.formats.detection import Source, recognise
from triptych.core.formats.format import facts_of
from triptych.core.formats.rules import fits
from triptych.core.optim import scaling
from triptych.core.parameters import Param, table

OPTIONAL = "optimizer."
"""Prefix of the optimizer's state, which a file may lack. Only the backend knows its entries."""

SHOWN = 8
"""Number of lines printed for each kind of problem."""


class Training(NamedTuple):
    """A training state.

    Attributes:
        state: weights, and the entries of the optimizer if the file has one.
        about: the system that it comes from.
        epochs: number of whole epochs behind it; None: not known.
    """

    state: State
    about: str
    epochs: int | None


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
    return _loaded(path, spec)[0]


def load_training_state(path: Path, spec: RunSpec, say: Say) -> State:
    """As ``load_weights``, with the state of a foreign optimizer, too.

    Args:
        path: as in ``load_weights``.
        spec: of the run.
        say: called with a line for each entry of the optimizer that starts anew or is left out, and
            with the remarks of the format.

    Raises:
        UserError: as in ``load_weights``, or the state of the optimizer is not that of the run.
    """
    return read_training(path, spec, say).state


def read_training(path: Path, spec: RunSpec, say: Say) -> Training:
    """As ``load_training_state``, with what the file says about the run so far."""
    state, source = _loaded(path, spec)
    epochs = source.format.epochs(source.content)
    if source.optimizer is None:
        return Training(state, source.format.about, epochs)
    for line in (*source.format.remarks, *_contradicted(source, spec)):
        say(f"{path}: {line}")
    try:
        own = training_state(source.optimizer, spec, lambda line: say(f"{path}: {line}"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if bad := [name for name, array in own.items() if not np.isfinite(array).all()]:
        raise UserError(f"{path}: {bad[0]}: not finite ({len(bad)} such entries)")
    own = scaling.fitted(own, spec.precision)
    return Training({**state, **own}, source.format.about, epochs)


def _contradicted(source: Source, spec: RunSpec) -> Iterator[str]:
    """The keys by which training goes on here in another way than in the file's system."""
    sections = spec.model_dump()
    for key, value in source.format.constants.items():
        section, _, name = key.partition(".")
        own = sections[section].get(name, value)
        if section != "model" and own != value:
            yield f"{key}: {own}; {source.format.about} has {value}"


def _loaded(path: Path, spec: RunSpec) -> tuple[State, Source]:
    """The weights of ``load_weights``, and the file that holds them."""
    manifest, source = read_weights(path, spec, average=spec.init.average)
    return fitted(path, manifest, source, spec), source


def fitted(path: Path, manifest: Manifest | None, source: Source, spec: RunSpec) -> State:
    """As ``load_weights``, of weights that ``read_weights`` gave."""
    state, problems = _fitted(source, spec)
    if manifest:
        _check_checkpoint(manifest, spec, path, fits=not problems)
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    required = [param.name for param in table(spec)]
    optional = [name for name in state if name.startswith(OPTIONAL)]
    return {name: state[name] for name in [*required, *optional]}


def _fitted(source: Source, spec: RunSpec) -> tuple[State, list[str]]:
    """The tensors of a file for a model, and why they do not fit."""
    own = source.layout is canonical.STATE
    if not own and spec.method.name not in source.layout.methods:
        needed = " or ".join(source.layout.methods) or "linear or finetune with init.weights"
        return {}, [
            f"method.name: {spec.method.name}: the file holds {source.layout.about} "
            f"({source.format.name}); it needs {needed}"
        ]
    shapes = source.shapes
    if not own and (other := other_encoder(spec.model, encoder_shapes(shapes))):
        return {}, [f"weights of another architecture: {other}"]
    params = table(spec)
    state = {**arrays_of(source), **{n: np.array(t.array()) for n, t in source.fresh.items()}}
    if isinstance(spec.method, SupervisedSpec):
        # A file has one classifier, which is the average of a run that has one.
        twins = {p.name: p.name.replace("teacher.", "student.", 1) for p in params}
        state.update({n: state[s] for n, s in twins.items() if n not in state and s in state})
    known = {param.name for param in params}
    named = {
        name if name in known or name not in source.tensors or own else source.named(name): array
        for name, array in state.items()
    }
    unknown = {
        name: tensor.array()
        for name, tensor in source.renamed.unknown.items()
        if not any(fits(template, name) for template in source.layout.beside)
    }
    return state, mismatches({**named, **unknown}, params)


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
    if not path.is_dir():
        return read_file(path)
    _, content = containers.open_weights(path)
    return {name: np.array(stored.array()) for name, stored in content.tensors().items()}


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


def read_weights(
    path: Path,
    spec: RunSpec | None,
    *,
    average: bool | None = None,
    facts: Facts | None = None,
) -> tuple[Manifest | None, Source]:
    """A checkpoint or run folder, or a file or folder of any system.

    Args:
        path: of the file or folder, or a name as ``published.local`` takes it.
        spec: of the run, if it is known. It decides where a file can be read in several ways.
        average: whether to take averaged weights, if the file has both.
        facts: about the model. None: those of the spec.

    Returns:
        The manifest if there is one, and the tensors under canonical names.

    Raises:
        UserError: the path is none of these or is damaged, or holds no state dict or several.
    """
    manifest, content = containers.open_weights(path)
    if facts is None:
        facts = facts_of(spec) if spec else {}
    return manifest, recognise(content, average=average, spec=spec, facts=facts)


def arrays_of(source: Source, prefix: str = "") -> State:
    """The values of a file by canonical name, in memory of their own, since the file may change.

    float16 and bfloat16 are widened to float32, except that float16 of npz and safetensors stays.

    Args:
        source: the file.
        prefix: of the canonical names of the tensors that are read.

    Raises:
        UserError: the values are not those that were saved.
    """
    narrow = source.content.container in (*containers.ARRAYS.values(), containers.CHECKPOINT)
    wanted = ((name, t) for name, t in source.tensors.items() if name.startswith(prefix))
    try:
        return dict(copies(wanted, partial(_array, narrow=narrow)))
    except Malformed as error:
        raise UserError(f"{printable(str(source.content.path))}: {error}") from error


def _array(stored: Stored, *, narrow: bool) -> Array:
    stored.verify()
    values = stored.array()
    wide = np.dtype(np.float32) if values.dtype == np.float16 and not narrow else values.dtype
    return copied(values, wide)
