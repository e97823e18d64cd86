"""The table of published weights for people and programs."""

from pathlib import Path
from typing import Any

from triptych.core.published import registry
from triptych.core.published.store import place

Report = dict[str, dict[str, Any]]


def report() -> Report:
    """Name -> recipe, format, address, known digits of the hash, and the path if it is here."""
    return {
        name: {
            "recipe": weights.recipe,
            "format": weights.format,
            "address": weights.address,
            "hash": ":".join(weights.digest) if weights.digest else None,
            "file": _here(place(weights)),
        }
        for name, weights in registry.table().items()
    }


def render(report: Report) -> str:
    """The report as two lines for each file."""
    lines = []
    for name, entry in report.items():
        facts = [entry["recipe"], f"names of {entry['format']}", entry["hash"], entry["file"]]
        lines += [f"{name}  ({', '.join(filter(None, facts))})", f"    {entry['address']}"]
    return "\n".join(lines)


def _here(path: Path) -> str | None:
    return str(path) if path.is_file() else None
