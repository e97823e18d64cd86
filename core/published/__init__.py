"""Weights that somebody has published: found by name, downloaded, checked and kept."""

import os
from pathlib import Path

from triptych.core.errors import UserError
from triptych.core.files.reading import SUFFIXES
from triptych.core.published import registry, store

__all__ = ["local", "recipe"]


def local(weights: str | Path) -> Path:
    """The file or folder that a user names as weights.

    Args:
        weights: a path; or, if there is nothing at that path, a name of the table of published
            weights.

    Returns:
        The path itself if it exists or looks like one; else that of the published file, which is
        downloaded if it is not here.

    Raises:
        UserError: nothing has this name, or the published file cannot be had.
    """
    name = str(weights)
    if os.path.lexists(weights):
        return Path(weights)
    if name in registry.table():
        return store.fetch(name, registry.table()[name])
    if os.sep in name or Path(name).suffix in SUFFIXES:
        return Path(weights)
    raise UserError(
        f"{name}: no such file or folder, and no published weights have this name"
        f"{registry.hint(name)}; tools/info.py weights lists them"
    )


def recipe(weights: str | Path | None) -> str:
    """The recipe of published weights.

    Raises:
        UserError: there is no such name, and so no recipe.
    """
    known = registry.table()
    if str(weights) in known:
        return known[str(weights)].recipe
    if weights is None:
        raise UserError("get_model: give a recipe, or the name of published weights")
    raise UserError(
        f"{weights}: no published weights have this name{registry.hint(str(weights))}, so give "
        "the recipe too: get_model(NAME, weights=...)"
    )
