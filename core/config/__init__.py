"""Reads and writes run specs.

A spec is a typed YAML file, which is checked as a whole before anything starts. It inherits from
the files that it names under ``_base_``: mappings merge, while lists and scalars are replaced.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from triptych.core.config import tree, validation, yaml12
from triptych.core.config.document import Node, dotted, show
from triptych.core.config.recipes import ALIASES, CONFIGS, find, recipes
from triptych.core.config.spec import RunSpec

__all__ = ["ALIASES", "CONFIGS", "changes", "dump", "find", "load", "loads", "recipes"]


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec of a file, or of a recipe by its name (``moco_v3/vit_small``).

    An override has the form ``a.b=c`` and replaces a value of the file. The key ``a.0.b`` names an
    item of a list. The value is all text after the first ``=``, and it holds no comment. It is a
    number, null, a list, a mapping or a quoted text as in YAML, or else plain text. An override of
    ``method.name`` keeps the other keys of the section, and the keys that the new method lacks are
    errors.

    Args:
        path: file or recipe.
        overrides: in the order of their application.

    Raises:
        UserError: one line for each mistake, with the file, line, key and allowed values.
    """
    root, problems = tree.read(find(path), overrides)
    return validation.validate(root, problems)


def loads(text: str, origin: str, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec of a text that ``dump`` wrote.

    Args:
        text: YAML without inheritance.
        origin: the file that holds the text, for messages.
        overrides: as in ``load``.

    Raises:
        UserError: as in ``load``.
    """
    root, problems = tree.read_text(text, origin, overrides)
    return validation.validate(root, problems)


def changes(path: str | Path, overrides: Sequence[str]) -> list[str]:
    """The values that overrides change, like ``train.steps=100 (not 3000)``.

    Raises:
        UserError: a file is missing or is no YAML mapping.
    """
    old, new = (dict(_leaves(tree.read(find(path), layer)[0])) for layer in ((), overrides))
    return [
        f"{key}={show(value)}" + (f" (not {show(old[key])})" if key in old else "")
        for key, value in new.items()
        if key not in old or old[key] != value
    ]


def _leaves(node: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The dotted name and the value of every node that is no mapping."""
    if not isinstance(node.content, dict):
        yield dotted(path), node.plain()
        return
    for key, child in node.content.items():
        yield from _leaves(child, (*path, key))


def dump(spec: RunSpec) -> str:
    """The resolved spec as YAML, with every key and no inheritance; ``load`` reads it back."""
    return yaml12.dump(spec.model_dump(mode="json"))
