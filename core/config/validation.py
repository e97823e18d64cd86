"""Turns values with positions into a spec, or into one error line for each mistake."""

import difflib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from triptych.core.config import schema
from triptych.core.config.document import KeyPath, Node, dotted, show
from triptych.core.config.fields import Contradictions
from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError

MISSING = object()


def validate(root: Node, problems: Sequence[str] = ()) -> RunSpec:
    """The spec of a tree of values.

    Args:
        root: mapping of all sections.
        problems: error lines that are already known.

    Raises:
        UserError: one line per problem, ``file:line: key: value: allowed values``. Contradictions
            between keys are reported only if each key of their section is valid.
    """
    lines = list(problems)
    try:
        spec = RunSpec.model_validate(root.plain())
    except ValidationError as error:
        if (retyped := _as_typed(root, error)) != root:
            return validate(retyped, problems)
        by_path: dict[KeyPath, str] = {}
        for path, message in _messages(root, error):
            last = root.trail(path)[-1]
            if not any(node.bad for node in root.trail(path)):
                by_path.setdefault(path, last.flaw or f"{last.mark}: {dotted(path)}: {message}")
        lines += [line for path, line in by_path.items() if not _follows(path, line, by_path)]
    if lines:
        raise UserError("\n".join(lines))
    return spec


def _as_typed(root: Node, error: ValidationError) -> Node:
    """The tree with the typed text of each override whose key takes text: 2024 may be a folder."""
    for item in error.errors(include_url=False):
        if item["type"] == "string_type":
            root = root.as_typed(schema.locate(item["loc"])[0])
    return root


def _follows(path: KeyPath, line: str, by_path: dict[KeyPath, str]) -> bool:
    """Whether another problem explains this one.

    A key is missing only because the name of its section, which sets it, is wrong. Or a list is too
    short only because one of its items is wrong.
    """
    name = (*path[:-1], "name")
    unnamed = path != name and name in by_path and ": missing: " in line
    items = {other[:-1] for other in by_path if isinstance(other[-1], int)}
    return unnamed or path in items


def _messages(root: Node, error: ValidationError) -> Iterator[tuple[KeyPath, str]]:
    for item in error.errors(include_url=False):
        path, nodes = schema.locate(item["loc"])
        kind, cause = item["type"], item.get("ctx", {}).get("error")
        if isinstance(cause, Contradictions):
            yield from (((*path, *e.key.split(".")), str(e)) for e in cause.found)
        elif kind == "extra_forbidden":
            yield path, _unknown(path, nodes[-2])
        elif kind.startswith("union_tag"):
            # The value that selects the union's member is missing or wrong: report its key.
            key = nodes[-1]["discriminator"]["propertyName"]
            yield (*path, key), _wrong(root, (*path, key), {"enum": schema.tags(nodes[-1])})
        elif kind == "missing" and isinstance(path[-1], int):
            yield path[:-1], _wrong(root, path[:-1], nodes[-2])
        elif kind == "string_type" and _value(root, path) is not MISSING:
            yield path, f"{_wrong(root, path, nodes[-1])}; text that looks like this needs quotes"
        elif isinstance(cause, ValueError):
            yield path, f"{show(_value(root, path))}: {cause}"
        else:
            yield path, _wrong(root, path, nodes[-1])


def _wrong(root: Node, path: KeyPath, node: schema.Schema) -> str:
    value = _value(root, path)
    if value is MISSING:
        return f"missing: expected {schema.describe(node)}"
    allowed = schema.describe(node)
    if isinstance(value, float) and not math.isfinite(value):
        allowed = allowed.replace("a number", "a finite number")
    return f"{show(value)}: expected {allowed}{_hint(value, schema.choices(node))}"


def _unknown(path: KeyPath, parent: schema.Schema) -> str:
    key, names = path[-1], list(schema.properties(parent))
    tag, owners = schema.owners(path)
    if owners:
        return f"unknown key: only where {dotted((*path[:-1], tag))} is {', '.join(owners)}"
    elsewhere = [other for other in _all_keys() if other.endswith(f".{key}")]
    # The same key in another section is a better hint than a key with a similar spelling.
    hint = (f" (did you mean {elsewhere[0]!r}?)" if elsewhere else "") or _hint(key, names)
    return f"unknown key{hint or '; expected one of ' + ', '.join(names)}"


def _hint(value: Any, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, names, 1, 0.55) if isinstance(value, str) else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def _all_keys() -> list[str]:
    sections = schema.properties(schema.schema())
    return [
        f"{section}.{key}"
        for section, node in sections.items()
        for key in schema.properties(schema.resolve(node))
    ]


def _value(root: Node, path: KeyPath) -> Any:
    trail = root.trail(path)
    return trail[-1].plain() if len(trail) == len(path) + 1 else MISSING
