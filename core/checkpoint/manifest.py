"""The manifest of a checkpoint: its tensors, its run, and digests that show damage."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import PIL
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from triptych.core import __version__
from triptych.core.config.spec import LinearSpec, RunSpec
from triptych.core.errors import UserError

FREE_KEYS = (
    "augment.on_device",
    "backend",
    "checkpoint",
    "data.class_names",
    "data.index",
    "data.on_error",
    "data.prefetch",
    "data.workers",
    "deterministic",
    "device",
    "evaluate",
    "log",
    "parallel",
    "threads",
    "train.accumulate",
    "train.compile",
    "train.stop_at",
)
"""Keys and whole sections that may differ on resume.

Only ``device``, ``deterministic`` and ``train.compile`` can change the numbers of a step. The
checkpoint records their effect as "compute", and a resume warns of a difference.
"""

PICTURE_KEYS = ("augment.eval_interpolation", "augment.eval_resize", "augment.eval_rounding")
"""Keys of the pictures for evaluation. They may differ on resume, unless a probe learns from such
pictures (``method.features: cached``)."""

MOVABLE_KEYS = ("data.eval_list", "data.eval_root", "data.list", "data.root")
"""Locations of the data. They may differ on resume, with a warning."""

SHARED_KEYS = (
    *("model.name", "model.image_size", "model.init", "model.zero_init_residual"),
    *("model.freeze_patch_embed", "model.freeze_positions", "model.fc_norm"),
)
"""Keys of the model in which two runs may differ and still share an encoder."""

HEAD_KEYS = ("method.blocks", "method.pooling", "method.rates", "method.weight_decays")
"""Keys that say what a classifier reads, or how it was trained."""

SHOWN, WIDTH = 8, 40
"""Most differences listed in one message, and most characters shown of a value."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Entry):
    """One file of the checkpoint.

    Attributes:
        sha256: digest of the content, hexadecimal.
        size: bytes.
    """

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class TensorEntry(_Entry):
    """One tensor: the file that holds it, its type and its shape."""

    file: str
    dtype: str
    shape: list[int]


FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
"""A name without folders, so that a manifest cannot point outside its own folder."""


class Manifest(_Entry):
    """All of a checkpoint except its arrays."""

    step: Annotated[int, Field(ge=0)]
    spec: dict[str, Any]
    """The resolved run spec."""
    versions: dict[str, str]
    """Package -> version, for triptych, NumPy, Pillow and the framework."""
    extra: dict[str, Any]
    """Further values that the run stored, e.g. the backend's name."""
    files: dict[FileName, FileEntry]
    tensors: dict[str, TensorEntry]

    def to_json(self) -> str:
        """The text of ``manifest.json``, with a digest of its own content."""
        content = self.model_dump(mode="json")
        return json.dumps({"digest": _digest(content), **content}, indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: bytes) -> "Manifest":
        """Parses and checks ``manifest.json``.

        Raises:
            ValueError: not JSON, not a manifest, or changed since it was written (one line).
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError("not JSON") from error
        if not isinstance(content, dict) or "digest" not in content:
            raise ValueError("not the manifest of a checkpoint")
        if content.pop("digest") != _digest(content):
            raise ValueError("changed since it was written")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{where}: {first['msg']}") from error


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that influence the numbers on every backend."""
    return {"triptych": __version__, "numpy": np.__version__, "pillow": PIL.__version__}


def stamp_warnings(manifest: Manifest, versions: Mapping[str, str]) -> list[str]:
    """One line for each package whose version is not the one that wrote the checkpoint.

    Args:
        versions: package -> installed version; a package that the manifest lacks is ignored.
    """
    effects = {
        "pillow": "resized pixels may differ from those of the run so far",
        "triptych": "see CHANGELOG.md for changed numbers",
    }
    return [
        f"{name} {old} wrote this checkpoint, {versions[name]} goes on: "
        + effects.get(name, "results may differ in the last digits")
        for name, old in manifest.versions.items()
        if versions.get(name, old) != old
    ]


def check_spec(manifest: Manifest, spec: RunSpec) -> list[str]:
    """Compares the spec stored in a checkpoint with the spec of the run that resumes from it.

    Returns:
        A warning for each key of ``MOVABLE_KEYS`` that differs.

    Raises:
        UserError: keys differ that change the run; one line names all of them, old -> new.
    """
    method = spec.method
    cached = isinstance(method, LinearSpec) and method.features == "cached"
    free = FREE_KEYS if cached else (*FREE_KEYS, *PICTURE_KEYS)
    changes = {
        key: change for key, change in differences(manifest, spec).items() if not _within(key, free)
    }
    moved = {key: changes.pop(key) for key in MOVABLE_KEYS if key in changes}
    if changes:
        raise UserError(
            f"checkpoint of step {manifest.step}: the spec has changed since ({_listed(changes)}); "
            "set these keys back, or start a new run in another --output"
        )
    return [
        f"{key}: {change}: the run goes on exactly only if the files are the same"
        for key, change in moved.items()
    ]


def other_architecture(manifest: Manifest, spec: RunSpec, *, shapes: bool) -> str | None:
    """The differing keys of model and method in one line, or None if none differs.

    Args:
        shapes: whether to list all these keys, as the tensors have other names or shapes. Else
            those alone by which equal tensors have another meaning.
    """
    changes = {
        key: change
        for key, change in differences(manifest, spec).items()
        if (_within(key, ("model", "method")) if shapes else _alters(key, spec))
    }
    return _listed(changes) if changes else None


def _alters(key: str, spec: RunSpec) -> bool:
    """Whether weights of equal shapes compute or mean something else with another value."""
    if key in HEAD_KEYS:
        return spec.method.labelled
    return _within(key, ("model",)) and key not in SHARED_KEYS


def differences(manifest: Manifest, spec: RunSpec) -> dict[str, str]:
    """Dotted key -> "old -> new" for each key that differs.

    Raises:
        UserError: this version cannot read the manifest's spec.
    """
    try:
        # Validation gives keys that are newer than the checkpoint their defaults.
        stored = RunSpec.model_validate(manifest.spec)
    except ValidationError as error:
        raise UserError(
            f"checkpoint of step {manifest.step}: its spec was written by triptych "
            f"{manifest.versions.get('triptych', '?')} and does not fit {__version__} "
            f"({error.error_count()} keys differ); resume it with that version"
        ) from error
    old = dict(flatten(stored.model_dump(mode="json")))
    new = dict(flatten(spec.model_dump(mode="json")))
    keys = list(dict.fromkeys([*old, *new]))
    return {
        key: f"{_shown(old.get(key))} -> {_shown(new.get(key))}"
        for key in keys
        if old.get(key) != new.get(key)
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) pairs of nested dictionaries."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _listed(changes: Mapping[str, str]) -> str:
    shown = [f"{key} {change}" for key, change in list(changes.items())[:SHOWN]]
    more = len(changes) - len(shown)
    return ", ".join([*shown, f"and {more} more"] if more else shown)
