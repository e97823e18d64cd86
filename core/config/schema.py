"""The JSON Schema of a spec file, for editors and for the allowed values in error messages."""

from functools import cache
from typing import Any

from triptych.core.config.document import KeyPath
from triptych.core.config.spec import RunSpec

Schema = dict[str, Any]


@cache
def schema() -> Schema:
    """The schema, generated from the models.

    A file may inherit, so no key is required, and ``_base_`` is allowed at the top level.
    """
    whole: Schema = _relaxed(RunSpec.model_json_schema())
    text = {"type": "string"}
    base = {
        "description": "Files (relative to this one) or recipes to inherit from; later ones win.",
        "anyOf": [text, {"type": "array", "items": text}],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "Generated: python -m triptych.core.config > configs/schema.json",
        **whole,
        "title": "Triptych run spec",
        "properties": {"_base_": base, **whole["properties"]},
    }


def _relaxed(node: Any) -> Any:
    """The schema without required keys and titles."""
    if isinstance(node, list):
        return [_relaxed(item) for item in node]
    if not isinstance(node, dict):
        return node
    relaxed = {}
    for key, value in node.items():
        if key in ("properties", "$defs"):
            relaxed[key] = {name: _relaxed(inner) for name, inner in value.items()}
        elif key == "oneOf":
            # Without required keys, an incomplete section matches several members of a union.
            relaxed["anyOf"] = _relaxed(value)
        elif key == "default":
            relaxed[key] = value
        elif key not in ("required", "title"):
            relaxed[key] = _relaxed(value)
    return relaxed


def locate(location: KeyPath) -> tuple[KeyPath, list[Schema]]:
    """The keys in the location of a validation error, without the names of union members.

    Inside a union without discriminator the path ends.

    Args:
        location: as pydantic reports it.

    Returns:
        The path of the key that the user wrote, and the schemas of the root and of each key on the
        way ({} for an unknown key).
    """
    path: list[str | int] = []
    nodes = [schema()]
    for part in location:
        node = nodes[-1]
        if "discriminator" in node:
            nodes[-1] = resolve({"$ref": node["discriminator"]["mapping"].get(part)})
        elif len(_members(node)) > 1:
            break
        else:
            path.append(part)
            nodes.append(child(node, part))
    return tuple(path), nodes


def child(node: Schema, part: str | int) -> Schema:
    """The schema of a key or item inside ``node``, or {} if there is none."""
    node = _members(node)[0]
    if isinstance(part, int):
        fixed: list[Schema] = node.get("prefixItems", [])
        return resolve(fixed[part] if part < len(fixed) else node.get("items", {}))
    return resolve(properties(node).get(part, {}))


def properties(node: Schema) -> dict[str, Schema]:
    """The schemas of the keys that a mapping allows. A union allows the keys of all its members."""
    if "discriminator" not in node:
        return dict(node.get("properties", {}))
    members = [resolve(member) for member in node["anyOf"]]
    return {key: value for member in members for key, value in properties(member).items()}


def tags(node: Schema) -> list[str]:
    """The values of a union's discriminator."""
    return list(node["discriminator"]["mapping"])


def owners(path: KeyPath) -> tuple[str, list[str]]:
    """The members of the union at ``path[:-1]`` that have the last key of ``path``.

    Returns:
        The union's discriminator, and the tags of these members. Without a union the list is empty.
    """
    node = schema()
    for part in path[:-1]:
        node = child(node, part)
    union = node.get("discriminator", {"propertyName": "", "mapping": {}})
    members = {tag: resolve({"$ref": ref}) for tag, ref in union["mapping"].items()}
    return union["propertyName"], [t for t, m in members.items() if path[-1] in properties(m)]


def resolve(node: Schema) -> Schema:
    """The target of a reference, or the node itself if it is none."""
    if not node.get("$ref"):
        return node
    target: Schema = schema()["$defs"][node["$ref"].rpartition("/")[2]]
    return target


def _members(node: Schema) -> list[Schema]:
    if "discriminator" in node or "anyOf" not in node:
        return [node]
    return [resolve(member) for member in node["anyOf"] if member.get("type") != "null"]


def choices(node: Schema) -> list[str]:
    """The texts that a key allows. The list is empty if the key takes any value."""
    listed = [str(value) for value in node.get("enum", [])]
    listed += [str(node["const"])] if isinstance(node.get("const"), str) else []
    return listed + [c for member in node.get("anyOf", []) for c in choices(member)]


def describe(node: Schema) -> str:
    """The allowed values of a key, in words."""
    node = resolve(node)
    if "discriminator" in node:
        return "a mapping"
    if "anyOf" in node:
        return " or ".join(describe(member) for member in node["anyOf"])
    if "enum" in node:
        return f"one of {', '.join(map(str, node['enum']))}"
    if "const" in node:
        return str(node["const"]).lower() if node["const"] is False else str(node["const"])
    kind = node.get("type", "")
    if kind in ("integer", "number"):
        return _number("an integer" if kind == "integer" else "a number", node)
    if kind == "array":
        return _list(node)
    words = {"boolean": "true or false", "string": "text", "null": "null", "object": "a mapping"}
    return words.get(kind, "something else")


def _number(noun: str, node: Schema) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    if low is not None and low == high:
        return str(low)
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {node[key]}" for key, sign in signs.items() if key in node]
    return " ".join([noun, " and ".join(bounds)]).strip()


def _list(node: Schema) -> str:
    fixed = node.get("prefixItems", [])
    item = describe(fixed[0] if fixed else node.get("items", {}))
    return f"a list of {len(fixed)}, each {item}" if fixed else f"a list, each {item}"
