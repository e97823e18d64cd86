"""From marked values to a spec, or to one line for each thing that is wrong."""

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
    """The spec.

    Args:
        problems: lines that are already known.

    Raises:
        UserError: one line per problem, ``file:line: key: value: what is allowed``. Contradictions
            between keys are told once each key of their section is valid by itself.
    """
    lines = list(problems)
    try:
        spec = RunSpec.model_validate(root.plain())
    except ValidationError as error:
        found: dict[KeyPath, str] = {}
        for path, message in _messages(root, error):
            last = root.trail(path)[-1]
            if not any(node.bad for node in root.trail(path)):
                found.setdefault(path, last.flaw or f"{last.mark}: {dotted(path)}: {message}")
        lines += [line for path, line in found.items() if not _follows(path, line, found)]
    if lines:
        raise UserError("\n".join(lines))
    return spec


def _follows(path: KeyPath, line: str, found: dict[KeyPath, str]) -> bool:
    """A key that is only missing because its section's name, which implies it, is wrong."""
    name = (*path[:-1], "name")
    return path != name and name in found and ": missing: " in line


def _messages(root: Node, error: ValidationError) -> Iterator[tuple[KeyPath, str]]:
    for item in error.errors(include_url=False):
        path, nodes = schema.locate(item["loc"])
        kind, cause = item["type"], item.get("ctx", {}).get("error")
        if isinstance(cause, Contradictions):
            yield from (((*path, *one.key.split(".")), str(one)) for one in cause.found)
        elif kind == "extra_forbidden":
            yield path, _unknown(path, nodes[-2])
        elif kind.startswith("union_tag"):
            # The union's own name, where the value that picks the member is missing or wrong.
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
    # The very key in another section tells more than one that is only spelled alike.
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
