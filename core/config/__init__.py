"""Reading and writing run specs.

A spec is a YAML file: typed, checked as a whole before anything starts, inheriting from the files
that it names under ``_base_`` (mappings merge, lists and values are replaced).
"""

from collections.abc import Sequence
from pathlib import Path

from triptych.core.config import tree, validation, yaml12
from triptych.core.config.recipes import ALIASES, CONFIGS, find, recipes
from triptych.core.config.spec import RunSpec

__all__ = ["ALIASES", "CONFIGS", "dump", "find", "load", "recipes"]


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


def dump(spec: RunSpec) -> str:
    """The resolved spec as YAML: every key, no inheritance; ``load`` reads it back equal."""
    return yaml12.dump(spec.model_dump(mode="json"))
