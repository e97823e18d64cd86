"""Reads YAML files with inheritance and overrides into values with their positions."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from triptych.core.config.document import Node, parse, parse_override, show
from triptych.core.config.recipes import find
from triptych.core.config.yaml12 import MAX_DEPTH
from triptych.core.errors import UserError

MAX_BYTES = 1_000_000
"""Limit of a file's size."""
MAX_CHAIN = 20
"""Limit of files in a chain of inheritance."""


def merge(base: Node, top: Node) -> Node:
    """Merges mappings. Any other value of ``top`` replaces that of ``base``."""
    if not (isinstance(base.content, dict) and isinstance(top.content, dict)):
        return top
    merged = {
        key: merge(base.content[key], node) if key in base.content else node
        for key, node in top.content.items()
    }
    return Node({**base.content, **merged}, top.mark)


def read(path: Path, overrides: Sequence[str] = ()) -> tuple[Node, list[str]]:
    """A file merged over its bases, with the overrides applied, and the problems so far.

    Args:
        path: of the file.
        overrides: ``a.b=c`` each, in the order of their application. ``parse_override`` reads c.

    Returns:
        The merged mapping, and a line for each problem that does not stop the reading.

    Raises:
        UserError: a file is missing or is not a YAML mapping.
    """
    reader = _Reader()
    try:
        root = reader.file(path, chain=())
    except UserError as error:
        raise UserError("\n".join([*reader.problems, str(error)])) from None
    for text in overrides:
        root = reader.override(root, text)
    return root, reader.problems


def read_text(text: str, origin: str, overrides: Sequence[str] = ()) -> tuple[Node, list[str]]:
    """As ``read``, of a text that inherits nothing.

    Args:
        text: YAML.
        origin: name of the text, for messages.
        overrides: as in ``read``.

    Raises:
        UserError: the text is no YAML mapping.
    """
    reader = _Reader()
    root = parse(text, origin, reader.problems)
    if root is None or root.bad or not isinstance(root.content, dict):
        raise UserError(f"{origin}: its spec is no YAML mapping")
    for override in overrides:
        root = reader.override(root, override)
    return root, reader.problems


class _Reader:
    def __init__(self) -> None:
        self.problems: list[str] = []
        self.done: dict[Path, Node] = {}

    def file(self, path: Path, chain: tuple[Path, ...]) -> Node:
        """A file merged over its bases. Each file is read once.

        Args:
            path: of the file.
            chain: the files that inherit from it, the first one first.
        """
        key = Path(os.path.realpath(path))
        if key not in self.done:
            root = parse(_text(path), str(path), self.problems)
            if root is None:
                raise UserError(f"{path}: empty; a spec is a YAML mapping (key: value)")
            if root.bad:
                raise UserError(self.problems.pop())
            if not isinstance(root.content, dict):
                raise UserError(
                    f"{root.mark}: expected a mapping (key: value), got {show(root.plain())}"
                )
            self.done[key] = self._over_bases(root, path, (*chain, path))
        return self.done[key]

    def _over_bases(self, root: Node, path: Path, chain: tuple[Path, ...]) -> Node:
        bases = root.content.pop("_base_", Node([], root.mark))
        names = bases.content if isinstance(bases.content, list) else [bases]
        merged, errors = Node({}, root.mark), []
        for name in names:
            try:
                merged = merge(merged, self._base(name, path, chain))
            except UserError as error:
                errors.append(str(error))
        if errors:
            raise UserError("\n".join(errors))
        return merge(merged, root)

    def _base(self, name: Node, path: Path, chain: tuple[Path, ...]) -> Node:
        if name.bad:
            return Node({}, name.mark)
        if not isinstance(name.content, str):
            raise UserError(
                f"{name.mark}: _base_: {show(name.plain())}: expected a file, or a list of files"
            )
        try:
            base = find(name.content, folder=path.parent)
        except UserError as error:
            raise UserError(f"{name.mark}: _base_: {error}") from None
        ancestors = [os.path.realpath(link) for link in chain]
        if os.path.realpath(base) in ancestors:
            start = ancestors.index(os.path.realpath(base))
            links = " -> ".join(str(link) for link in (*chain[start:], base))
            raise UserError(f"{name.mark}: _base_: inheritance cycle: {links}")
        if len(chain) > MAX_CHAIN:
            raise UserError(f"{name.mark}: _base_: more than {MAX_CHAIN} files in a row")
        return self.file(base, chain)

    def override(self, root: Node, text: str) -> Node:
        """Sets one key. Missing sections are created, while list items must exist."""
        mark = f"-o {text if text.isprintable() and len(text) < 80 else show(text)}"
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts) or len(parts) > MAX_DEPTH:
            self.problems.append(f"{mark}: expected KEY=VALUE, like train.steps=100")
            return root
        try:
            return _set(root, parts, parse_override(value, mark, self.problems))
        except UserError as error:
            self.problems.append(str(error))
            return root


def _set(node: Node, parts: Sequence[str], leaf: Node) -> Node:
    if not parts:
        return merge(node, leaf)
    part, rest = parts[0], parts[1:]
    if isinstance(node.content, list):
        items = dict(zip(map(str, range(len(node.content))), node.content, strict=True))
        if part not in items:
            raise UserError(f"{leaf.mark}: no item {part!r} in a list of {len(items)}, from 0 on")
        items[part] = _set(items[part], rest, leaf)
        return replace(node, content=list(items.values()))
    children = node.content if isinstance(node.content, dict) else {}
    child = children.get(part, Node({} if rest else None, leaf.mark))
    return replace(node, content={**children, part: _set(child, rest, leaf)})


def _text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UserError(f"{path}: longer than {MAX_BYTES} bytes; that is no spec")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not a text file in UTF-8 (byte {data[error.start]:#04x} at {error.start}); "
            "give a YAML file"
        ) from None
