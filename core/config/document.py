"""Parses a YAML document into values with their positions. No tag in it runs code."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import yaml

from triptych.core.config.yaml12 import MAX_DEPTH, SCALARS, TAG, Loader, scalar
from triptych.core.errors import UserError

MAX_VALUES = 100_000
"""Limit of values in a document, since links (``*name``) can repeat a value without end."""

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Node:
    """One value and its position.

    Attributes:
        content: scalar, dict of nodes or list of nodes.
        mark: position, "file:line" or "-o key=value".
        bad: whether the value was reported already. Validation then does not report it again.
        text: of an override, as it was typed. It is the value where the key takes text.
        flaw: for an override that is not YAML, the error line. It counts unless the key takes text.
    """

    content: Any
    mark: str
    bad: bool = False
    text: str | None = None
    flaw: str | None = None

    def plain(self) -> Any:
        """The value without marks."""
        if isinstance(self.content, dict):
            return {key: node.plain() for key, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.plain() for node in self.content]
        return self.content

    def as_typed(self, path: KeyPath) -> "Node":
        """This node with the text of an override, as it was typed, at ``path``."""
        if not path:
            return self if self.text is None else replace(self, content=self.text)
        content, part = self.content, path[0]
        if isinstance(content, dict) and part in content:
            return replace(self, content={**content, part: content[part].as_typed(path[1:])})
        if isinstance(content, list) and isinstance(part, int) and part < len(content):
            items = [*content[:part], content[part].as_typed(path[1:]), *content[part + 1 :]]
            return replace(self, content=items)
        return self

    def trail(self, path: KeyPath) -> "list[Node]":
        """This node and those along ``path``, as far as they exist."""
        nodes = [self]
        for part in path:
            content = nodes[-1].content
            if isinstance(content, dict) and part in content:
                nodes.append(content[part])
            elif isinstance(content, list) and isinstance(part, int) and part < len(content):
                nodes.append(content[part])
            else:
                break
        return nodes


def parse(text: str, name: str, problems: list[str], *, lines: bool = True) -> Node | None:
    """The value of a YAML document, or None for an empty one.

    Args:
        text: of the document.
        name: source of the text, for marks and messages.
        problems: receives a line for each duplicate key and each tag.
        lines: whether marks and messages name the line.

    Raises:
        UserError: the text is not YAML.
    """

    def at(mark: yaml.Mark | None) -> str:
        return f"{name}:{mark.line + 1}" if lines and mark else name

    try:
        node = Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise UserError(f"{at(error.problem_mark)}: not YAML: {what}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        where = f"{name}:{line}" if lines else name
        raise UserError(f"{where}: not YAML: character {error.character:#06x}") from None
    except (ValueError, OverflowError):
        # The scanner hands escapes like "\UFFFFFFFF" straight to chr().
        raise UserError(f"{name}: not YAML: an escape names no character") from None
    return None if node is None else _Builder(at, problems).build(node, ())


def parse_override(text: str, mark: str, problems: list[str]) -> Node:
    """The value of ``-o key=value``: a list, a mapping or a quoted text in YAML, or a plain scalar.

    ``#`` is an ordinary character here, and so are YAML's signs for blocks, links and tags.

    Args:
        text: of the value.
        mark: of the resulting node.
        problems: as in ``parse``.
    """
    if text.lstrip()[:1] not in ("[", "{", "'", '"') or not text.strip():
        return Node(scalar(text), mark, text=text)
    # YAML cannot switch comments off, so another character replaces "#" during parsing.
    stand_in = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
    try:
        node = parse(text.replace("#", stand_in), mark, problems, lines=False)
    except UserError as error:
        return Node(text, mark, flaw=str(error).replace(stand_in, "#"))
    return replace(_with_hashes(node, stand_in), text=text) if node else Node(None, mark)


def _with_hashes(node: Node, stand_in: str) -> Node:
    """The node with "#" in place of ``stand_in`` in all keys and texts."""

    def back(value: Any) -> Any:
        return value.replace(stand_in, "#") if isinstance(value, str) else value

    if isinstance(node.content, dict):
        content: Any = {back(k): _with_hashes(v, stand_in) for k, v in node.content.items()}
    elif isinstance(node.content, list):
        content = [_with_hashes(item, stand_in) for item in node.content]
    else:
        content = back(node.content)
    return replace(node, content=content)


class _Builder:
    """Makes values from YAML nodes. It knows mappings, lists and ``SCALARS`` only."""

    def __init__(self, at: Callable[[yaml.Mark | None], str], problems: list[str]) -> None:
        self.at, self.problems, self.count = at, problems, 0

    def build(self, node: yaml.Node, path: KeyPath) -> Node:
        self.count += 1
        mark = self.at(node.start_mark)
        if len(path) > MAX_DEPTH or self.count > MAX_VALUES:
            raise UserError(f"{mark}: {dotted(path[:3])}: links (*name) make it endless")
        kind = node.tag.removeprefix(TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return Node(self._mapping(node, path), mark)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            items = [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return Node(items, mark)
        if isinstance(node, yaml.ScalarNode) and kind in SCALARS:
            try:
                return Node(SCALARS[kind](node.value), mark)
            except (ValueError, KeyError):
                return self._bad(mark, path, f"{show(node.value)} is not of the kind {kind}")
        tag = node.tag.replace(TAG, "!!")
        return self._bad(mark, path, f"tag {tag} is refused: a spec holds plain values only")

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            mark = self.at(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != f"{TAG}str":
                self._bad(mark, path, "a key is not text")
                continue
            key = key_node.value
            inner = (*path, key)
            if key in children:
                self._bad(mark, inner, f"duplicate key, first set at {children[key].mark}")
                continue
            children[key] = replace(self.build(value_node, inner), mark=mark)
        return children

    def _bad(self, mark: str, path: KeyPath, message: str) -> Node:
        where = f"{mark}: {dotted(path)}" if path else mark
        self.problems.append(f"{where}: {message}")
        return Node(None, mark, bad=True)


def dotted(path: Iterable[str | int]) -> str:
    """Writes ``("augment", "view1", 0)`` as ``augment.view1.0``, on one line for all keys."""
    return ".".join(part if str(part).isprintable() else repr(part) for part in map(str, path))


def show(value: Any, limit: int = 60) -> str:
    """The value in YAML, in one line of at most ``limit`` characters."""
    words = {None: "null", True: "true", False: "false"}
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        items = [show(item) for item in value[:10]]
        if len(value) > 10:
            items.append("...")
        text = f"[{', '.join(items)}]"
    elif value is None or isinstance(value, bool):
        text = words[value]
    elif isinstance(value, float):
        text = {"nan": ".nan", "inf": ".inf", "-inf": "-.inf"}.get(repr(value), repr(value))
    else:
        text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
