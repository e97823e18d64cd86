"""PyYAML with the scalars of YAML 1.2's core schema, as in JSON and editors.

PyYAML itself reads YAML 1.1, where ``1e-3`` is text, ``no`` is false and ``1:30`` is 90.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

MAX_DEPTH = 40
"""Limit of nesting in a document. A spec needs five levels."""

TAG = "tag:yaml.org,2002:"
BOOLS = {"true": True, "false": False}


def _int(text: str) -> int:
    if len(text) > 40:
        # Python refuses to print much longer integers.
        raise ValueError(text)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: BOOLS[text.lower()],
    "int": _int,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    "str": str,
}
"""Maps each kind of scalar to a function from text to value.

The function raises ValueError or KeyError for text of another kind."""

_PATTERNS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class Loader(yaml.SafeLoader):
    """Composes YAML nodes. The caller makes values from them, by ``SCALARS`` only."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (as PyYAML declares it)
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """As in the base class, but deep nesting is an error of the file, not a stack overflow."""
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(
                None, None, f"nested deeper than {MAX_DEPTH} levels", self.get_mark()
            )
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def scalar(text: str) -> Any:
    """The value of a plain scalar: null, bool, int or float, or else the text itself."""
    plain = text.strip()
    kinds = [kind for kind, (form, _) in _PATTERNS.items() if re.fullmatch(form, plain)]
    try:
        return SCALARS[kinds[0]](plain) if kinds else text
    except ValueError:
        return text


class Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that ``Loader`` would read as another type."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (as PyYAML declares it)

    def ignore_aliases(self, data: Any) -> bool:
        """Always true: equal values are written in full, without links."""
        return True


for _kind, (_pattern, _first) in _PATTERNS.items():
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(rf"(?:{_pattern})$"), _first)


def _list(dumper: Dumper, items: list[Any]) -> yaml.Node:
    scalars = not any(isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence(TAG + "seq", items, flow_style=scalars)


Dumper.add_representer(list, _list)


def dump(values: dict[str, Any]) -> str:
    """Plain values as YAML. Keys keep their order, and a list of scalars is on one line."""
    text: str = yaml.dump(
        values, Dumper=Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True
    )
    return text
