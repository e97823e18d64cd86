"""Reading and writing run specs.

A spec is a YAML file: typed, checked as a whole before anything starts, inheriting from the files
that it names under ``_base_`` (mappings merge, lists and values are replaced).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from triptych.core.config import tree, validation, yaml12
from triptych.core.config.document import Node, dotted, show
from triptych.core.config.recipes import ALIASES, CONFIGS, find, recipes
from triptych.core.config.spec import RunSpec

__all__ = ["ALIASES", "CONFIGS", "changes", "dump", "find", "load", "recipes"]


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec of a file, or of a recipe by its name (``moco_v3/vit_small``).

    Args:
        overrides: ``a.b=c`` each: a last layer over the file. ``a.0.b`` is an item of a list. All
            that stands after the first ``=`` is the value, and nothing in it is a comment: a
            number, null, a list, a mapping or a quoted text as in YAML, else the text as it is.
            An override of ``method.name`` keeps the other keys of the section, and those that the
            new method has not are errors.

    Raises:
        UserError: one line for each thing that is wrong, with file, line, key and what is allowed.
    """
    root, problems = tree.read(find(path), overrides)
    return validation.validate(root, problems)


def changes(path: str | Path, overrides: Sequence[str]) -> list[str]:
    """What overrides set otherwise than the file does, like ``train.steps=100 (not 3000)``.

    Raises:
        UserError: as ``load``, where there is nothing to go on with.
    """
    old, new = (dict(_leaves(tree.read(find(path), given)[0])) for given in ((), overrides))
    return [
        f"{key}={show(value)}" + (f" (not {show(old[key])})" if key in old else "")
        for key, value in new.items()
        if key not in old or old[key] != value
    ]


def _leaves(node: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted name and value of whatever is no mapping."""
    if not isinstance(node.content, dict):
        yield dotted(path), node.plain()
        return
    for key, child in node.content.items():
        yield from _leaves(child, (*path, key))


def dump(spec: RunSpec) -> str:
    """The resolved spec as YAML: every key, no inheritance; ``load`` reads it back equal."""
    return yaml12.dump(spec.model_dump(mode="json"))
