"""Runs side by side as a table: losses, difference of the loss curves, evaluations, speed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from triptych.core.evaluation.row import Evaluation
from triptych.core.parity.compare import relative_error
from triptych.core.runs.record import RunRecord

FEATURES = ("trained", "random init", "raw pixels")
HEADINGS = ("run", "first loss", "last loss", "largest curve difference")


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        difference: from the first run's losses (see ``difference``); None for the first run.
        evaluations: (protocol's title, features, variant) -> the newest row of that kind.
    """

    name: str
    backend: str
    steps: int
    first_loss: float
    last_loss: float
    difference: float | None
    evaluations: dict[tuple[str, str, str], Evaluation]
    images_per_second: float | None


def table(records: Sequence[RunRecord]) -> list[Row]:
    """One row per run, in order. The other runs are compared with the first one."""
    names = unique_names(records)
    return [_row(name, record, records[0]) for name, record in zip(names, records, strict=True)]


def unique_names(records: Sequence[RunRecord]) -> list[str]:
    """The names of the runs' folders if these are all different, else the folders' paths."""
    short = [record.path.resolve().name for record in records]
    return short if len(set(short)) == len(short) else [str(record.path) for record in records]


def difference(run: RunRecord, reference: RunRecord) -> float | None:
    """max|a - b| / max|b| of the losses at the steps that both runs logged.

    Returns:
        None if no step was logged by both runs.
    """
    common = sorted(run.loss.keys() & reference.loss.keys())
    if not common:
        return None
    losses, expected = (np.array([r.loss[step] for step in common]) for r in (run, reference))
    return relative_error(losses, expected)


def headings(rows: Sequence[Row]) -> list[str]:
    """Column titles for ``cells``."""
    kinds = _kinds(rows)
    columns = [
        " ".join(filter(None, (title, kinds[title].sign, features)))
        for title, features in _columns(rows)
    ]
    return [*HEADINGS, *columns, "images/s"]


def caption(rows: Sequence[Row]) -> str:
    """Explains the numbers in ``cells``, for each protocol."""
    parts = []
    for title, kind in _kinds(rows).items():
        variants = " / ".join(filter(None, _variants(rows, title)))
        metric = "" if kind.metric == title else f" {kind.metric}"
        parts.append(
            f"{title}{metric} on {kind.measured_on}" + (f": {variants}" if variants else "")
        )
    return "; ".join(parts)


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """One row as text, in the order of ``headings``."""
    texts = [
        row.name if row.backend in row.name else f"{row.name} ({row.backend})",
        f"{row.first_loss:.5f}",
        f"{row.last_loss:.5f}",
        "–" if row is rows[0] else _number(row.difference, "{:.1e}"),
    ]
    for title, features in _columns(rows):
        kinds = [(title, features, variant) for variant in _variants(rows, title)]
        texts.append("/".join(_measured(row.evaluations.get(kind)) for kind in kinds))
    return [*texts, _number(row.images_per_second, "{:.0f}")]


def _row(name: str, record: RunRecord, reference: RunRecord) -> Row:
    last = {
        (row.title, row.features, row.variant): row
        for row in sorted(record.evaluations, key=lambda row: row.step)
    }
    return Row(
        name=name,
        backend=record.backend,
        steps=record.steps[-1].step,
        first_loss=record.steps[0].loss,
        last_loss=record.steps[-1].loss,
        difference=None if record is reference else difference(record, reference),
        evaluations=last,
        images_per_second=record.result.images_per_second if record.result else None,
    )


def _kinds(rows: Sequence[Row]) -> dict[str, Evaluation]:
    """Title -> a row of each protocol, in the order of their first rows."""
    kinds: dict[str, Evaluation] = {}
    for row in rows:
        for (title, _, _), evaluation in row.evaluations.items():
            kinds.setdefault(title, evaluation)
    return kinds


def _columns(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(protocol's title, features) of each column."""
    seen = {(title, features) for row in rows for title, features, _ in row.evaluations}
    return [(t, features) for t in _kinds(rows) for features in FEATURES if (t, features) in seen]


def _variants(rows: Sequence[Row], title: str) -> list[str]:
    """The protocol's variants, whose numbers share a cell: the main one first."""
    main = {
        variant: evaluation.main
        for row in rows
        for (name, _, variant), evaluation in row.evaluations.items()
        if name == title
    }
    return sorted(main, key=lambda variant: not main[variant])


def _measured(row: Evaluation | None) -> str:
    return _number(None if row is None else row.measured, "{:.1f}")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
