"""Opens a file for a conversion: its format, and the spec of the run that it comes from."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from triptych.core import config
from triptych.core.checkpoint.manifest import Manifest
from triptych.core.config.document import parse_override
from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError, printable
from triptych.core.files.tree import Content
from triptych.core.formats import canonical
from triptych.core.formats.architecture import encoder_shapes, other_encoder
from triptych.core.formats.changes import Facts
from triptych.core.formats.containers import open_weights
from triptych.core.formats.detection import Source, recognise
from triptych.core.formats.format import facts_of
from triptych.core.formats.specs import spec_of

SPEC = "spec"
"""Key under which files of our own hold the spec of the run, as YAML."""
WHOLE = ("pretraining", "any")
"""Kinds of layouts that hold a whole run."""


@dataclass(frozen=True)
class Opened:
    """A file to convert. Its tensors lie in the mapped file until they are used.

    Attributes:
        source: the file.
        spec: of the run.
        manifest: of a checkpoint of our own.
    """

    source: Source
    spec: RunSpec
    manifest: Manifest | None = None


def opened(
    path: Path,
    wanted: str | None,
    recipe: str | None,
    overrides: Sequence[str],
    *,
    average: bool | None,
    trained: bool = True,
) -> Opened:
    """Opens a file or folder.

    The spec is the given recipe, or the one that the file holds, or what the tensors show.

    Args:
        path: a checkpoint or run folder of our own, or a file or folder of any system, or a name as
            ``published.local`` takes it.
        wanted: name of the file's format; None: it is recognised.
        recipe: of the run, as in ``config.load``; None: the file's own.
        overrides: keys of the spec.
        average: as in ``recognise``.
        trained: whether the state of the optimizer is wanted. Otherwise one that does not fit the
            model is left alone.

    Raises:
        UserError: the file is unusable, or is not what the recipe says.
    """
    given = config.load(recipe, overrides) if recipe else None
    manifest, content = open_weights(path)
    text = _own_spec(manifest, content)
    known = given or (config.loads(text, str(path), overrides) if text else None)
    facts = facts_of(known) if known else _facts(overrides)
    source = recognise(content, wanted=wanted, average=average, spec=known, facts=facts)
    source = replace(source, trained=trained)
    if given:
        _check(source, given)
    if given and source.layout.kind not in WHOLE and not given.method.labelled:
        # A single network has no run of pretraining: the recipe says what its encoder is.
        model = given.model.model_dump(mode="json").items()
        known = spec_of(source, [f"model.{key}={json.dumps(value)}" for key, value in model])
    spec = known or spec_of(source, overrides)
    return Opened(source, spec, manifest)


def _own_spec(manifest: Manifest | None, content: Content) -> str | None:
    """The spec that a file of our own holds, as YAML."""
    if manifest:
        try:
            return config.dump(RunSpec.model_validate(manifest.spec))
        except ValidationError as error:
            raise UserError(
                f"{printable(str(content.path))}: its spec does not fit this version "
                f"({error.error_count()} keys differ); give -c SPEC"
            ) from error
    text = content.tree.get(SPEC) if isinstance(content.tree, dict) else None
    return text if isinstance(text, str) else None


def _facts(overrides: Iterable[str]) -> Facts:
    """The keys of ``model`` that the caller gives."""
    pairs = (text.partition("=") for text in overrides)
    return {
        key: parse_override(value, f"-o {key}={value}", []).plain()
        for key, _, value in pairs
        if key.startswith("model.")
    }


def _check(source: Source, spec: RunSpec) -> None:
    """Refuses a file that is not what a recipe says."""
    path, layout = printable(str(source.content.path)), source.layout
    if layout.kind == "pretraining" and spec.method.name not in layout.methods:
        raise UserError(
            f"{path}: holds {layout.about} ({source.format.name}), and -c has method.name "
            f"{spec.method.name}; give a recipe of {' or '.join(layout.methods)}"
        )
    for branch in ("student", "teacher"):
        if other := other_encoder(spec.model, encoder_shapes(source.shapes, branch)):
            raise UserError(f"{path}: an encoder of another architecture than -c: {other}")
    if source.layout is canonical.FORMAT.layouts[0]:
        return
    told = source.told(spec)
    if changed := [f"{key} {value}, -c has {own}" for key, value, own in told]:
        remedy = "give " + " ".join(f"-o {key}={value}" for key, value, _ in told)
        raise UserError(f"{path}: the file says {', '.join(changed)}; {remedy}")


def read_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec of the run that a file of weights comes from, or of a run with its model.

    Args:
        path: as in ``opened``.
        overrides: keys of the spec. They count before what the file says.

    Raises:
        UserError: the file is unusable, or does not say a key that no override gives.
    """
    words = dict(text.split("=", 1) for text in overrides if "=" in text)
    average = {"true": True, "false": False}.get(words.get("init.average", ""))
    return opened(path, None, None, overrides, average=average).spec
