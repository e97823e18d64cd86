"""Weights that somebody has published: found by name, downloaded, checked and kept."""

import os
from pathlib import Path

from triptych.core.errors import UserError
from triptych.core.files.reading import SUFFIXES
from triptych.core.published import hub, registry, store

__all__ = ["local", "recipe"]

SPEC = "spec.yaml"
"""Name of the resolved spec in a run's folder and in a model folder."""


def local(weights: str | Path) -> Path:
    """The file or folder that a user names as weights.

    Args:
        weights: a path; or, if there is nothing at that path, a name of the table of published
            weights, or ``hf://owner/name`` or ``hf://owner/name@revision`` for a model folder of
            the Hugging Face Hub.

    Returns:
        The path itself if it exists or looks like one; else that of the published file or folder,
        which is downloaded if it is not here.

    Raises:
        UserError: nothing has this name, or what has it cannot be had.
    """
    name = str(weights)
    if os.path.lexists(weights):
        return Path(weights)
    if name in registry.table():
        return store.fetch(name, registry.table()[name])
    if address := hub.parse(name):
        return hub.fetch(address)
    if os.sep in name or Path(name).suffix in SUFFIXES:
        return Path(weights)
    raise UserError(
        f"{name}: no such file or folder, and no published weights have this name"
        f"{registry.hint(name)}; tools/info.py weights lists them"
    )


def recipe(weights: str | Path | None) -> str | Path | None:
    """The recipe of published weights, or the spec beside the weights of a run or model folder.

    Returns:
        None if the weights come without a spec.

    Raises:
        UserError: there are no weights, or nothing has this name.
    """
    known = registry.table()
    if weights is None:
        raise UserError("get_model: give a recipe, or the name of published weights")
    if str(weights) in known:
        return known[str(weights)].recipe
    spec = local(weights) / SPEC
    return spec if spec.is_file() else None
