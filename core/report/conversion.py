"""The table that a conversion prints, and the same as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

from triptych.core.config.spec import ModelSpec, VitSpec
from triptych.core.errors import printable
from triptych.core.formats.conversion import Check, Plan, Row
from triptych.core.formats.detection import FORMATS
from triptych.core.formats.format import Format

SHOWN = 3
"""Number of tensors of one kind that the table lists."""


def text(made: Plan, checks: Sequence[Check]) -> str:
    """The table of a conversion.

    Args:
        made: the plan.
        checks: of its encoders.
    """
    source = made.source
    lines = [
        f"{printable(str(source.content.path))}: {source.content.container}, {source.layout.about} "
        f"({source.format.name}), {source.place.name}, {len(source.place.tensors)} tensors",
        f"to {made.target.name}: {made.choice.layout.about}; {_model(made.spec.model)}",
    ]
    kinds: dict[str, list[str]] = {}
    for row in made.rows:
        kinds.setdefault(row.kind, []).append(_row(row))
    if made.optimizer:
        names = [n for n in made.optimizer if n.count(".") > 1]
        kinds[f"optimizer ({made.spec.optim.name})"] = [
            f"{name} {made.optimizer[name].shape}" for name in names
        ]
    for reason in dict.fromkeys(made.left.values()):
        names = [name for name, why in made.left.items() if why == reason]
        kinds[f"left out ({reason})" if not reason.startswith("kept") else reason] = names
    kinds["unused"] = [f"{name} {shape}" for name, shape in made.unused.items()]
    kinds["missing"] = [f"{name} {shape}" for name, shape in made.missing.items()]
    for kind, entries in kinds.items():
        lines += _lines(kind, entries)
    lines += [f"note: {printable(note)}" for note in made.notes]
    if not checks:
        lines.append("self-check: none, as no whole encoder is converted")
    lines += [
        f"self-check, {check.branch}: relative difference of the features {check.reading:.1e} "
        f"({source.format.name}), {check.writing:.1e} ({made.target.name})"
        for check in checks
    ]
    return "\n".join(lines)


def _model(model: ModelSpec) -> str:
    height, width = model.size
    size = f"{height}x{width} pixels, {model.channels} channels"
    if isinstance(model, VitSpec):
        return f"ViT of width {model.width}, {model.depth} blocks, {model.heads} heads, {size}"
    return f"ResNet {'-'.join(map(str, model.depths))} of width {model.width}, {size}"


def _row(row: Row) -> str:
    if row.theirs == row.written:
        return _tensors(row.written)
    return f"{_tensors(row.theirs)} -> {_tensors(row.written)}".removeprefix(" -> ")


def _tensors(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return " + ".join(f"{printable(name)} {shape}" for name, shape in shapes.items())


def _lines(kind: str, entries: Sequence[str]) -> list[str]:
    """A heading with the number of entries, and the first ones."""
    more = len(entries) - SHOWN
    shown = [f"    {printable(entry)}" for entry in entries[:SHOWN]]
    return [f"  {kind}: {len(entries)}", *shown, *([f"    and {more} more"] if more > 0 else [])]


def as_json(made: Plan, checks: Sequence[Check]) -> dict[str, Any]:
    """All of a conversion, as an object for JSON. Arguments as in ``text``."""
    source = made.source
    return {
        "source": {
            "path": str(source.content.path),
            "container": source.content.container,
            "format": source.format.name,
            "layout": source.layout.about,
            "place": source.place.name,
        },
        "target": {"format": made.target.name, "layout": made.choice.layout.about},
        "spec": made.spec.model_dump(mode="json"),
        "step": made.step,
        "tensors": [
            {
                "from": {name: list(shape) for name, shape in row.theirs.items()},
                "canonical": row.name,
                "to": {name: list(shape) for name, shape in row.written.items()},
                "changes": list(row.changes),
            }
            for row in made.rows
        ],
        "optimizer": {name: list(tensor.shape) for name, tensor in made.optimizer.items()},
        "left_out": made.left,
        "unused": {name: list(shape) for name, shape in made.unused.items()},
        "missing": {name: list(shape) for name, shape in made.missing.items()},
        "notes": made.notes,
        "problems": made.problems,
        "self_check": {c.branch: {"reading": c.reading, "writing": c.writing} for c in checks},
    }


def formats() -> str:
    """What each format reads and writes, as a table."""
    rows = [("format", "ways", "optimizer", "of", "holds"), *map(_abilities, FORMATS.values())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows)


def _abilities(found: Format) -> tuple[str, ...]:
    writes = found.output is not None or found.name == "canonical"
    optimizer = found.moments is not None or any(x.kind == "any" for x in found.layouts)
    holds = dict.fromkeys(layout.about.removeprefix("a ") for layout in found.layouts)
    ways = "read, write" if writes else "read"
    return found.name, ways, "yes" if optimizer else "no", found.about, ", ".join(holds)
