"""Runs side by side as a table: losses, how far the curves part, k-NN, speed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from triptych.core.parity.compare import relative_error
from triptych.core.runs.record import RunRecord

FEATURES = ("trained", "random init", "raw pixels")
HEADINGS = ("run", "first loss", "last loss", "largest curve difference")


@dataclass(frozen=True)
class Row:
    """One run. difference: to the first run, over the steps that both logged; None for itself.

    top1: (features, labels) -> share of right answers at the last evaluation.
    """

    name: str
    backend: str
    steps: int
    first_loss: float
    last_loss: float
    difference: float | None
    top1: dict[tuple[str, str], float]
    images_per_second: float | None


def table(records: Sequence[RunRecord]) -> list[Row]:
    """One row per run, in order; the first is what the others are compared with."""
    names = unique_names(records)
    return [_row(name, record, records[0]) for name, record in zip(names, records, strict=True)]


def unique_names(records: Sequence[RunRecord]) -> list[str]:
    """The folders' own names where they tell the runs apart, else their paths."""
    short = [record.path.resolve().name for record in records]
    return short if len(set(short)) == len(short) else [str(record.path) for record in records]


def difference(run: RunRecord, reference: RunRecord) -> float | None:
    """max|a - b| / max|b| over the loss at the steps that both logged; None if there are none."""
    common = sorted(run.loss.keys() & reference.loss.keys())
    if not common:
        return None
    own, other = (np.array([r.loss[step] for step in common]) for r in (run, reference))
    return relative_error(own, other)


def headings(rows: Sequence[Row]) -> list[str]:
    """Column titles for ``cells``."""
    knn = [f"k-NN % {features}" for features in FEATURES] if _labels(rows) else []
    return [*HEADINGS, *knn, "images/s"]


def caption(rows: Sequence[Row]) -> str:
    """What the pairs of numbers in ``cells`` are."""
    kinds = ["all labels" if kind == "all" else f"{kind} per class" for kind in _labels(rows)]
    return f"k-NN top-1 on held-out images: {' / '.join(kinds)}" if kinds else ""


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """One row as text, in the order of ``headings``."""
    labels = _labels(rows)
    found = [
        row.name if row.backend in row.name else f"{row.name} ({row.backend})",
        f"{row.first_loss:.5f}",
        f"{row.last_loss:.5f}",
        "–" if row is rows[0] else _number(row.difference, "{:.1e}"),
    ]
    for features in FEATURES if labels else ():
        values = [row.top1.get((features, label)) for label in labels]
        found.append("/".join(_number(v and 100 * v, "{:.1f}") for v in values))
    return [*found, _number(row.images_per_second, "{:.0f}")]


def _row(name: str, record: RunRecord, reference: RunRecord) -> Row:
    top1 = {
        (row.features, str(row.labels)): row.top1
        for row in sorted(record.evaluations, key=lambda row: row.step)
        if row.eval == "knn"
    }
    return Row(
        name=name,
        backend=record.backend,
        steps=record.steps[-1].step,
        first_loss=record.steps[0].loss,
        last_loss=record.steps[-1].loss,
        difference=None if record is reference else difference(record, reference),
        top1=top1,
        images_per_second=record.result.images_per_second if record.result else None,
    )


def _labels(rows: Sequence[Row]) -> list[str]:
    """Kinds of labelled banks: "all" first, then by size."""
    found = {labels for row in rows for _, labels in row.top1}
    return sorted(found, key=lambda labels: (labels != "all", len(labels), labels))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
