"""Tables of names: which tensor of a file is which canonical tensor.

A rule pairs two templates. A template is a name with fields in braces:

    ``{i}``, ``{j}``: a whole number.
    ``{leaf}``: a word without a dot.
    ``{rest}``: one or more words.

Templates spell the tensors of a batch norm as PyTorch does, and a table says how its files do.

The first rule whose template fits a name counts, in either direction, so a special case stands
before the general one. Reading and writing use the same table, so they always agree.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

from triptych.core.files.tree import Malformed, Stored
from triptych.core.formats.changes import SAME, Change, Facts

FIELDS = {"i": r"\d+", "j": r"\d+", "leaf": r"[^.]+", "rest": r".+"}

COUNTER = "num_batches_tracked"
"""Number of batches that a batch norm has seen."""

Spelling = Mapping[str, str]
"""Last words of the names of a batch norm's tensors in a file, by canonical last word."""

TORCH: Spelling = {word: word for word in ("running_mean", "running_var", COUNTER)}
PADDLE: Spelling = {"running_mean": "_mean", "running_var": "_variance"}
"""Paddle counts no batches."""
ANY: Spelling = {**TORCH, **{word: word for word in PADDLE.values()}}

Tensors = Mapping[str, Stored]


class Rule(NamedTuple):
    """A pair of templates with the same fields.

    Attributes:
        theirs: template of the names in a file, or one template for each part of the tensor.
        ours: template of the canonical names.
        change: how the values differ.
    """

    theirs: str | tuple[str, ...]
    ours: str
    change: Change = SAME

    @property
    def sources(self) -> tuple[str, ...]:
        """The templates of all parts."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs


@dataclass(frozen=True)
class Renamed:
    """The tensors of a file under canonical names.

    Attributes:
        tensors: by canonical name, in the order of the file.
        origin: canonical name -> names in the file.
        changes: canonical name -> name of the change, "" for none.
        unknown: what no rule names, by its name in the file.
    """

    tensors: dict[str, Stored] = field(default_factory=dict)
    origin: dict[str, tuple[str, ...]] = field(default_factory=dict)
    changes: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, Stored] = field(default_factory=dict)


class Table:
    """A sequence of rules, applied in both directions."""

    def __init__(self, *rules: Rule, norms: Spelling = TORCH) -> None:
        """A table of rules.

        Args:
            rules: the more special ones first.
            norms: spelling in the files. A name with the last word of another spelling is unknown.
        """
        self.rules, self.norms = rules, norms
        self._canonical = {theirs: ours for ours, theirs in norms.items()}

    def to_canonical(self, tensors: Tensors, facts: Facts) -> Renamed:
        """The tensors of a file under canonical names.

        Raises:
            Malformed: a tensor has a shape that its rule cannot change, or two tensors of the file
                are one canonical tensor.
            UserError: a change needs a fact that is not known.
        """
        renamed = Renamed()
        parts: dict[str, tuple[Rule, dict[int, str]]] = {}
        for name in tensors:
            for ours, rule, part in self._ours(name):
                known, names = parts.setdefault(ours, (rule, {}))
                if known is rule and part in names:
                    raise Malformed(f"{names[part]} and {name} are one tensor, {ours}")
                if known is rule:
                    names[part] = name
                    break
            else:
                renamed.unknown[name] = tensors[name]
        for ours, (rule, names) in parts.items():
            found = tuple(names[part] for part in sorted(names))
            if len(found) < len(rule.sources):
                renamed.unknown.update((name, tensors[name]) for name in found)
                continue
            try:
                tensor = rule.change.to_canonical([tensors[name] for name in found], facts)
            except Malformed as error:
                raise Malformed(f"{found[0]}: {error}") from error
            renamed.tensors[ours] = tensor
            renamed.origin[ours] = found
            renamed.changes[ours] = "" if tensor is tensors[found[0]] else rule.change.name
        return renamed

    def names(self, name: str) -> bool:
        """Whether a rule names a tensor of a file."""
        return next(self._ours(name), None) is not None

    def _ours(self, name: str) -> Iterator[tuple[str, Rule, int]]:
        """The canonical name of a tensor, its rule, and its part in the canonical tensor."""
        spelled = _spelled(name, self._canonical)
        for rule in self.rules if spelled else ():
            for part, template in enumerate(rule.sources):
                if (fields := _fields(template, spelled)) is not None:
                    yield rule.ours.format_map(fields), rule, part

    def theirs(self, ours: str) -> tuple[tuple[str, ...], Change] | None:
        """The names in a file of a canonical tensor and its change; None if no rule names it."""
        for rule in self.rules:
            if (fields := _fields(rule.ours, ours)) is not None:
                names = [source.format_map(fields) for source in rule.sources]
                spelled = tuple(_spelled(name, self.norms) for name in names)
                return (spelled, rule.change) if all(spelled) else None
        return None

    def from_canonical(self, tensors: Tensors, facts: Facts) -> tuple[dict[str, Stored], list[str]]:
        """Canonical tensors under the names of a file, and the names that no rule names.

        Raises:
            UserError: a change needs a fact that is not known.
        """
        written: dict[str, Stored] = {}
        left: list[str] = []
        for ours, tensor in tensors.items():
            if (found := self.theirs(ours)) is None:
                left.append(ours)
                continue
            names, change = found
            written.update(zip(names, change.from_canonical(tensor, facts), strict=True))
        return written, left


def _spelled(name: str, words: Spelling) -> str:
    """The name with its last word spelled otherwise; "" if no such file has this last word."""
    start, dot, last = name.rpartition(".")
    if last not in ANY:
        return name
    return f"{start}{dot}{words[last]}" if last in words else ""


def named(name: str, patterns: Collection[str]) -> bool:
    """Whether a pattern names a tensor.

    A pattern that ends in "." stands for all names that begin with it; another one for itself.
    """
    return any(name == p or (p.endswith(".") and name.startswith(p)) for p in patterns)


def fits(template: str, name: str) -> bool:
    """Whether a name has the form of a template."""
    return _fields(template, name) is not None


def under(theirs: str, ours: str, rules: Sequence[Rule]) -> list[Rule]:
    """The rules with a prefix on either side.

    Args:
        theirs: prefix of the names in the file.
        ours: prefix of the canonical names.
        rules: without the prefixes.
    """
    moved = []
    for rule in rules:
        sources = tuple(theirs + source for source in rule.sources)
        single = isinstance(rule.theirs, str)
        moved.append(Rule(sources[0] if single else sources, ours + rule.ours, rule.change))
    return moved


@cache
def _pattern(template: str) -> tuple[str, re.Pattern[str]]:
    """How the names begin, and their whole form."""
    words = re.split(r"\{(\w+)\}", template)
    fixed, fields = words[::2], words[1::2]
    groups = [*(f"(?P<{name}>{FIELDS[name]})" for name in fields), ""]
    form = "".join(re.escape(text) + group for text, group in zip(fixed, groups, strict=True))
    return fixed[0], re.compile(form)


def _fields(template: str, name: str) -> dict[str, str] | None:
    """The fields of a name; None if it has not the form of the template."""
    start, form = _pattern(template)
    # Most names differ at their beginning, and to compare it takes a tenth of the time.
    found = form.fullmatch(name) if name.startswith(start) else None
    return found.groupdict() if found else None
