"""Takes the encoder out of a file of pretrained weights."""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from triptych.core import parameters
from triptych.core.checkpoint.manifest import SHARED_KEYS, Manifest, differences
from triptych.core.config.spec import InitSpec, RunSpec, VitSpec
from triptych.core.contracts import State
from triptych.core.data.source import native_path
from triptych.core.errors import UserError
from triptych.core.formats import canonical
from triptych.core.formats.adapting import FIRST, adapted_channels
from triptych.core.formats.architecture import difference
from triptych.core.formats.detection import Source
from triptych.core.formats.loading import (
    SHOWN,
    arrays_of,
    fitted,
    mismatches,
    read_weights,
)
from triptych.core.formats.positions import Grid, resample, square_grid
from triptych.core.formats.rules import fits, named
from triptych.core.parameters import encoder
from triptych.core.parameters.param import prefixed

STUDENT, TEACHER = "student.encoder.", "teacher.encoder."
TABLE = "pos_embed"
CLASSIFIER_PARTS = "student.classifier."
CLASSIFIER = f"{CLASSIFIER_PARTS}weight"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Pretrained:
    """An encoder from a file.

    Attributes:
        tensors: by canonical name with ``student.encoder.`` in front.
        source: format and branch in the file.
        fresh: canonical names of the encoder's tensors that the file lacks.
        grid: (rows, columns) of the file's position table if it was resampled, else None.
        channels: of the file's images if the first layer was adapted, else None.
    """

    tensors: State
    source: str
    fresh: tuple[str, ...]
    grid: Grid | None
    channels: int | None = None

    def line(self, path: Path, state: State) -> str:
        """One line that says what came from the file and what has its initial values.

        Args:
            path: of the file.
            state: the whole state.
        """
        parts = dict.fromkeys(".".join(name.split(".")[:2]) for name in state)
        kept = [*self.fresh, *(part for part in parts if not part.endswith(".encoder"))]
        more = [f"and {len(kept) - SHOWN} more"] if len(kept) > SHOWN else []
        text = f"init: {path} ({self.source}): {len(self.tensors)} tensors of the encoder"
        if self.grid:
            text += f", positions resampled from {_times(self.grid)}"
        if self.channels:
            text += f", first layer adapted from {self.channels} channels"
        return f"{text}; initial values: {', '.join([*kept[:SHOWN], *more]) or 'none'}"


def initial_state(spec: RunSpec, say: Say | None = None) -> State:
    """The first state of a run: initial values, and the encoder of ``spec.init.weights``.

    A teacher begins with the same encoder.

    Args:
        spec: of the run.
        say: called with one line if weights were loaded.

    Raises:
        UserError: as in ``load_encoder``.
    """
    state = parameters.initial_state(spec)
    if spec.init.weights is None:
        if say and spec.method.name == "linear":
            say("init: init.weights is not set; the probed encoder keeps its random weights")
        return state
    path = Path(native_path(spec.init.weights))
    pretrained = read_encoder(path, spec, spec.init)
    for name, array in pretrained.tensors.items():
        state[name] = array
        twin = name.replace(STUDENT, TEACHER, 1)
        if twin in state:
            state[twin] = array.copy()
    if say:
        say(pretrained.line(path, state))
    return state


def load_encoder(path: Path, spec: RunSpec, init: InitSpec) -> State:
    """The encoder of a file, for the model of ``spec``, with the dtypes of the file.

    Args:
        path: a checkpoint or run folder, or a file or folder as in ``containers``, of any known
            format.
        spec: of the run. Its method may be another one than that of the file.
        init: which encoder to take, and what may be missing or unused. Its ``weights`` is ignored.

    Returns:
        The tensors ``student.encoder.*`` in the order of ``core.parameters.table(spec)``, without
        those that may be missing and are.

    Raises:
        UserError: the file is unreadable, holds no encoder, or one of another architecture or kind;
            or a tensor is missing, superfluous, misshapen or not finite. There is one line for each
            such tensor.
    """
    return read_encoder(path, spec, init).tensors


def load_encoders(path: Path, spec: RunSpec) -> State:
    """What an evaluation needs of a file: the encoders, or the whole of a classifier.

    A file of another system may hold one encoder alone. A checkpoint is loaded as a whole, so that
    one of another method is refused.

    Args:
        path: as in ``load_encoder``.
        spec: of the run.

    Returns:
        ``student.encoder.*`` and ``teacher.encoder.*`` as far as the file has them, or as
        ``load_weights``.

    Raises:
        UserError: as in ``load_encoder`` or ``load_weights``.
    """
    manifest, source = read_weights(path, spec, average=spec.init.average)
    if spec.method.labelled or manifest or source.format is canonical.FORMAT:
        return fitted(path, manifest, source, spec)
    state: State = {}
    with _named_file(path):
        for branch in source.branches or ("student",):
            init = spec.init.model_copy(update={"branch": branch})
            found = _pretrained(manifest, source, spec, init).tensors
            state |= {n.replace("student.", f"{branch}.", 1): a for n, a in found.items()}
    begun = {name: tensor for name, tensor in source.fresh.items() if ".encoder." in name}
    return {**state, **{name: np.array(tensor.array()) for name, tensor in begun.items()}}


def read_encoder(path: Path, spec: RunSpec, init: InitSpec) -> Pretrained:
    """As ``load_encoder``, with what a message says about the encoder."""
    manifest, source = read_weights(path, spec, average=init.average)
    with _named_file(path):
        return _pretrained(manifest, source, spec, init)


@contextmanager
def _named_file(path: Path) -> Iterator[None]:
    """Puts the file's name before each line of an error."""
    try:
        yield
    except UserError as error:
        lines = str(error).splitlines()
        raise UserError("\n".join(f"{path}: {line}" for line in lines)) from error


def _pretrained(
    manifest: Manifest | None, source: Source, spec: RunSpec, init: InitSpec
) -> Pretrained:
    prefix, label, found = _encoder(source, init.branch)
    params = encoder(spec.model)
    shapes = {param.name: param.shape for param in params}
    _check_kind(manifest, source, init)
    unused = _unused(source, prefix, found, shapes.keys(), spec, init)
    channels = _adapt_channels(found, spec, init)
    if other := difference(shapes, {n: a.shape for n, a in found.items()}):
        alone = other.startswith("the file has channels")
        remedy = "; set init.channels to adapted to change the first layer" if alone else ""
        raise UserError(f"weights of another architecture: {other}{remedy}")
    if manifest:
        _check_model(manifest, spec)
    else:
        _check_facts(source, spec)
    grid = _resampled_grid(found, manifest, spec, init)
    if grid and init.positions != "exact" and isinstance(spec.model, VitSpec):
        found[TABLE] = resample(found[TABLE], grid, spec.model.grid, init.positions)
    if wrong := [p for p in init.allow_missing if not any(named(name, [p]) for name in shapes)]:
        raise UserError(
            f"init.allow_missing: {', '.join(wrong)}: the model's encoder has no such tensor"
        )
    missing = [param for param in params if param.name not in found]
    lacked = [*_may_lack(spec, init), *(name.removeprefix(prefix) for name in source.fresh)]
    fresh = [p.name for p in missing if named(p.name, lacked)]
    wanted = prefixed(STUDENT, [param for param in params if param.name not in fresh])
    state = {STUDENT + name: found[name] for name in shapes if name in found}
    if problems := mismatches({**state, **unused}, wanted):
        raise UserError("\n".join(problems))
    return Pretrained(state, label, tuple(STUDENT + n for n in fresh), grid, channels)


def _adapt_channels(found: State, spec: RunSpec, init: InitSpec) -> int | None:
    """Adapts the first layer, if the spec wants that; returns the channels of the file then."""
    name = next((name for name in FIRST if name in found and found[name].ndim == 4), None)
    channels = found[name].shape[1] if name else 0
    if name is None or channels == spec.model.channels or init.channels == "exact":
        return None
    found[name] = adapted_channels(found[name], spec.model.channels)
    return channels


def _encoder(source: Source, wanted: str) -> tuple[str, str, State]:
    """The encoder to take: its canonical prefix, its description, its tensors without prefix."""
    branches = source.branches
    if not branches:
        raise UserError(
            f"holds no encoder: its names are those of {source.layout.about} "
            f"({source.format.name}), and none is of an encoder"
        )
    branch = wanted if wanted in branches else branches[0]
    which = branch if len(branches) > 1 else source.layout.about
    prefix = f"{branch}.encoder."
    found = {n.removeprefix(prefix): array for n, array in arrays_of(source, prefix).items()}
    return prefix, f"{source.format.name}, {which}", found


def _unused(
    source: Source,
    prefix: str,
    found: State,
    wanted: Collection[str],
    spec: RunSpec,
    init: InitSpec,
) -> State:
    """The arrays that are neither used nor known to be beside the encoder, by name in the file."""
    surplus = {
        source.named(prefix + name): array for name, array in found.items() if name not in wanted
    }
    beside = source.layout.beside
    unknown = {
        name: tensor.array()
        for name, tensor in source.renamed.unknown.items()
        if not any(fits(template, name) for template in beside)
    }
    # The model replaces the last norm by one of its own.
    replaced = [source.named(f"{prefix}norm.{leaf}") for leaf in ("weight", "bias")
                if _fresh_norm(spec) and f"norm.{leaf}" in found]  # fmt: skip
    allowed = [*init.allow_unused, *replaced]
    return {n: a for n, a in {**surplus, **unknown}.items() if not named(n, allowed)}


def _may_lack(spec: RunSpec, init: InitSpec) -> list[str]:
    return [*init.allow_missing, *(["fc_norm."] if _fresh_norm(spec) else [])]


def _fresh_norm(spec: RunSpec) -> bool:
    return isinstance(spec.model, VitSpec) and spec.model.fc_norm


def _check_kind(manifest: Manifest | None, source: Source, init: InitSpec) -> None:
    """Refuses what is no plain pretrained encoder, unless the spec names what it leaves out.

    These are a classifier that was trained with labels, and a ViT with a second token.
    """
    if source.layout.kind == "distilled":
        heads = [source.named(n) for n in source.tensors if n.startswith(CLASSIFIER_PARTS)]
        left_out = [*source.renamed.unknown, *heads]
        if all(named(name, init.allow_unused) for name in left_out):
            return
        raise UserError(
            f"{source.layout.about}, on which all features depend; to take the encoder without it, "
            f"set init.allow_unused to [{', '.join(left_out)}]"
        )
    finetuned = manifest is not None and manifest.spec["method"]["name"] == "finetune"
    trained = finetuned or source.layout.kind in ("classifier", "linear probe")
    if not trained or CLASSIFIER not in source.tensors:
        return
    name = source.named(CLASSIFIER)
    if not named(name, init.allow_unused):
        raise UserError(
            f"a classifier of {source.tensors[CLASSIFIER].shape[0]} classes ({name}), not a "
            "pretrained encoder; to take its encoder, set init.allow_unused to "
            f"[{name.removesuffix('weight')}]"
        )


def _check_facts(source: Source, spec: RunSpec) -> None:
    """Refuses an encoder whose file says that it computes something else, as with other heads."""
    told = source.told(spec)
    if changes := [f"{key} {value} -> {own}" for key, value, own in told]:
        remedy = "give the file's own: " + " ".join(f"-o {key}={value}" for key, value, _ in told)
        raise UserError(f"weights of another architecture: {', '.join(changes)}; {remedy}")


def _check_model(manifest: Manifest, spec: RunSpec) -> None:
    """Refuses an encoder of equal shapes that computes something else, as with other heads."""
    changes = {
        key: change
        for key, change in differences(manifest, spec).items()
        if key.startswith("model.") and key not in SHARED_KEYS
    }
    if changes:
        listed = ", ".join(f"{key} {change}" for key, change in changes.items())
        raise UserError(f"weights of another architecture: {listed}")


def _resampled_grid(
    found: State, manifest: Manifest | None, spec: RunSpec, init: InitSpec
) -> Grid | None:
    """The grid of the file's position table, if the model has another one.

    Raises:
        UserError: the spec wants the same grid, or the file does not show its grid.
    """
    table, model = found.get(TABLE), spec.model
    if table is None or not isinstance(model, VitSpec) or table.ndim != 3:
        return None
    stored = RunSpec.model_validate(manifest.spec).model if manifest else None
    grid = stored.grid if isinstance(stored, VitSpec) else None
    if grid is None:
        same = table.shape[1] == 1 + math.prod(model.grid)
        grid = model.grid if same else square_grid(table)
    if grid == model.grid:
        return None
    if grid is None:
        raise UserError(
            f"{TABLE}: {table.shape[1]} positions are those of no square grid and a class token; "
            f"the model's grid is {_times(model.grid)}"
        )
    if init.positions == "exact":
        raise UserError(
            f"{TABLE}: a grid of {_times(grid)} patches, the model's is {_times(model.grid)}; "
            "set init.positions to bicubic, bicubic_antialias or dino to resample it"
        )
    return grid


def _times(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"
