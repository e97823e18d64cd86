"""One self-contained HTML page about some runs: curves, table, health, versions, spec.

The page runs no script and loads nothing from the network: its content security policy forbids
both. All text that comes from a run is escaped, file names and spec values included.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree.ElementTree import Element, tostring

from triptych.core import config
from triptych.core.config.spec import RunSpec
from triptych.core.evaluation.row import RAW_PIXELS, Evaluation
from triptych.core.files.writing import write_atomically
from triptych.core.report import table
from triptych.core.report.charts import Chart, Level, Series
from triptych.core.report.markup import document, element
from triptych.core.report.style import STYLE
from triptych.core.runs.record import RunRecord
from triptych.core.runs.rows import Step

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write(
    records: Sequence[RunRecord], path: Path, pictures: Sequence[Sequence[Element]] = ()
) -> None:
    """Writes the page.

    Args:
        records: at least one run. The other runs are compared with the first one.
        pictures: of each run, as ``core.report.pictures.section`` gives them; empty: none.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(path, render(records, pictures))


def write_picture(records: Sequence[RunRecord], path: Path) -> None:
    """Writes the loss curves as an SVG file, e.g. for a README; arguments as in ``write``."""
    chart = _loss_chart(records, table.unique_names(records))
    picture = chart.picture(STYLE)
    write_atomically(path, tostring(picture, encoding="unicode") + "\n")


def render(records: Sequence[RunRecord], pictures: Sequence[Sequence[Element]] = ()) -> str:
    """The page as text; arguments as in ``write``."""
    names = table.unique_names(records)
    heading = "Triptych: " + ", ".join(names)
    style = element("style", STYLE)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", heading),
        style,
    )
    parts = [
        element("h1", heading),
        _introduction(records),
        _section("Side by side", _side_by_side(records)),
        _section("Curves", *_curves(records, names)),
        _section("Health", _health(records, names)),
        *(
            _section(f"Pictures of {name}", *content)
            for name, content in zip(names, pictures, strict=False)
        ),
        *_method_pictures(records, names),
        _section("Environment", _environment(records, names)),
        _section("Spec", *_specs(records, names)),
    ]
    body = element("body", element("main", *parts))
    return document(element("html", head, body, lang="en"))


def _section(title: str, *children: Element) -> Element:
    return element("section", element("h2", title), *children)


def _introduction(records: Sequence[RunRecord]) -> Element:
    """One sentence for each kind of run."""
    sentences = dict.fromkeys(_sentence(record) for record in records)
    return element("p", " ".join(sentences))


def _sentence(record: RunRecord) -> str:
    spec = record.spec
    return (
        f"{spec.method.name} on {spec.data.name}, {spec.model.name} at "
        f"{spec.model.size[0]}×{spec.model.size[1]} pixels, batch {spec.train.batch_size}, "
        f"{spec.precision}, seed {spec.seed}."
    )


def _grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Element:
    """A table whose first column names the row."""
    head = element("tr", *(element("th", text, scope="col") for text in headings))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", c) for c in row[1:]))
        for row in rows
    ]
    made = element("table", element("thead", head), element("tbody", *body))
    return element("div", made, class_="wide")


def _side_by_side(records: Sequence[RunRecord]) -> Element:
    rows = table.table(records)
    cells = [table.cells(row, rows) for row in rows]
    grid = _grid(table.headings(rows), cells)
    return element("div", grid, element("p", table.caption(rows), class_="note"))


# ------------------------------------------------------------------------------------------ curves


def _curves(records: Sequence[RunRecord], names: Sequence[str]) -> list[Element]:
    charts = [_loss_chart(records, names)]
    if len(records) > 1:
        charts.append(_difference_chart(records, names))
    charts += _evaluation_charts(records, names)
    return [chart.figure() for chart in charts]


def _loss_chart(records: Sequence[RunRecord], names: Sequence[str]) -> Chart:
    series = [
        Series(name, sorted(record.loss.items()), colour)
        for colour, (name, record) in enumerate(zip(names, records, strict=True))
    ]
    summary = "; ".join(
        f"{name}: from {record.steps[0].loss:.4g} to {record.steps[-1].loss:.4g} "
        f"at step {record.steps[-1].step}"
        for name, record in zip(names, records, strict=True)
    )
    curves, levels = _chances(records, names)
    return Chart("Loss", summary, [*series, *curves], "step", "loss", levels=levels)


def _chances(
    records: Sequence[RunRecord], names: Sequence[str]
) -> tuple[list[Series], list[Level]]:
    """Chance levels: a curve for a run whose level changes (MOCA), else a horizontal line.

    Runs with the same constant level share one line.
    """
    curves, fixed = [], set()
    for colour, (name, record) in enumerate(zip(names, records, strict=True)):
        points = [(row.step, row.chance) for row in record.steps if row.chance is not None]
        levels = {chance for _, chance in points}
        if len(levels) > 1:
            curves.append(Series(f"{name}, chance", points, colour, dashed=True))
        else:
            fixed |= levels
    return curves, [Level(f"chance {chance:.3f}", chance) for chance in sorted(fixed)]


def _difference_chart(records: Sequence[RunRecord], names: Sequence[str]) -> Chart:
    """Plots |a - b| / max|b| at each step; the maximum of a curve is the number in the table."""
    reference = records[0].loss
    series = []
    for colour, (name, record) in enumerate(zip(names, records, strict=True)):
        common = sorted(record.loss.keys() & reference.keys())
        scale = max((abs(reference[step]) for step in common), default=0.0) or 1.0
        points = [(step, abs(record.loss[step] - reference[step]) / scale) for step in common]
        if colour:
            series.append(Series(name, points, colour))
    summary = "; ".join(
        f"{s.name}: at most {max((y for _, y in s.points), default=0.0):.1e}" for s in series
    )
    title = f"Relative difference of the loss to {names[0]} (0 lies on the lower edge)"
    return Chart(title, summary, series, "step", "relative difference", log=True)


def _evaluation_charts(records: Sequence[RunRecord], names: Sequence[str]) -> list[Chart]:
    """One chart for each protocol that measures a number."""
    rows = [row for record in records for row in record.evaluations if row.measured is not None]
    first = {row.title: row for row in reversed(rows)}
    return [
        _evaluation_chart(first[title], records, names)
        for title in dict.fromkeys(row.title for row in rows)
    ]


def _evaluation_chart(
    kind: Evaluation, records: Sequence[RunRecord], names: Sequence[str]
) -> Chart:
    """The curves of all rows of the protocol that ``kind`` is a row of."""
    series, levels = [], {}
    for colour, (name, record) in enumerate(zip(names, records, strict=True)):
        for variant, rows in _variants(record.evaluations, kind.title):
            points = sorted(
                (row.step, row.measured)
                for row in rows
                if row.measured is not None and row.features != RAW_PIXELS
            )
            dashed = not rows[0].main
            series.append(Series(_listed(name, variant), points, colour, dashed, marked=True))
            for row in rows:
                if row.measured is not None and row.features == RAW_PIXELS:
                    levels[f"{_listed(RAW_PIXELS, variant)}: {row.measured:.1f}"] = row.measured
    summary = "; ".join(
        f"{s.name}: {s.points[-1][1]:.1f} {kind.sign}".rstrip() for s in series if s.points
    )
    drawn = [Level(name, value) for name, value in levels.items()]
    what = f"{kind.title} accuracy" if kind.score is not None else kind.title
    compared = any(x == 0 for s in series for x, _ in s.points)
    heading = f"{what} (step 0: random initial weights)" if compared else what
    axis = _listed(kind.metric, kind.sign)
    return Chart(heading, summary, series, "step", axis, levels=drawn)


def _listed(*words: str) -> str:
    return ", ".join(filter(None, words))


def _variants(evaluations: Sequence[Evaluation], title: str) -> list[tuple[str, list[Evaluation]]]:
    """A protocol's rows by variant, the main one first."""
    rows = sorted((r for r in evaluations if r.title == title), key=lambda row: not row.main)
    variants = dict.fromkeys(row.variant for row in rows)
    return [(name, [row for row in rows if row.variant == name]) for name in variants]


# ------------------------------------------------------------------------------------------ tables


def _health(records: Sequence[RunRecord], names: Sequence[str]) -> Element:
    headings = [
        "run",
        "steps",
        "finished",
        "state over time",
        "feature std, last",
        "gradient norm, median / largest",
        "images/s, median",
        "waiting for data, median %",
        "damaged files skipped",
    ]
    rows = [[name, *_health_cells(r)] for name, r in zip(names, records, strict=True)]
    return _grid(headings, rows)


def _health_cells(record: RunRecord) -> list[str]:
    def values(key: str) -> list[float]:
        logged = [getattr(row, key) for row in record.steps]
        return [value for value in logged if value is not None]

    norms, spread = values("gradient_norm"), values("feature_std")
    return [
        str(record.steps[-1].step),
        "yes" if record.result else "no",
        _story(record.steps),
        f"{spread[-1]:.3f}" if spread else "–",
        f"{median(norms):.3g} / {max(norms):.3g}" if norms else "–",
        _median(values("images_per_second"), "{:.0f}"),
        _median([100 * share for share in values("data_wait")], "{:.1f}"),
        str(record.steps[-1].skipped),
    ]


def _median(values: Sequence[float], form: str) -> str:
    return form.format(median(values)) if values else "–"


def _story(steps: Sequence[Step], most: int = 6) -> str:
    """The states a run went through, each with the step it was first logged at."""
    changes = [(state, next(rows).step) for state, rows in groupby(steps, lambda row: row.state)]
    shown = [f"{state} from step {step}" for state, step in changes if state]
    left_out = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {left_out} more changes" if left_out > 0 else "")


def _moca_pictures(spec: RunSpec, run_dir: Path) -> list[Element]:
    # Imported only for MOCA: the module uses the NumPy reference, which needs autograd and SciPy.
    from triptych.core.report import moca_words

    return moca_words.section(spec, run_dir)


PICTURES: dict[str, tuple[str, Callable[[RunSpec, Path], list[Element]]]] = {
    "moca": ("Masks and words", _moca_pictures),
}
"""Method -> (heading, content) of the section that each run of the method gets."""


def _method_pictures(records: Sequence[RunRecord], names: Sequence[str]) -> list[Element]:
    """One section for each run whose method is in ``PICTURES``."""
    sections = []
    for name, record in zip(names, records, strict=True):
        if record.spec.method.name in PICTURES:
            heading, content = PICTURES[record.spec.method.name]
            sections.append(_section(f"{heading} of {name}", *content(record.spec, record.path)))
    return sections


def _environment(records: Sequence[RunRecord], names: Sequence[str]) -> Element:
    headings = ["run", "backend", "versions", "device", "threads", "training, s"]
    rows = []
    for name, record in zip(names, records, strict=True):
        result = record.result
        if result is None:
            rows.append([name, record.backend, *["not finished"] * 4])
            continue
        versions = ", ".join(f"{package} {number}" for package, number in result.versions.items())
        seconds = "–" if result.seconds is None else f"{result.seconds:.1f}"
        threads = str(result.threads or "–")
        rows.append([name, record.backend, versions, result.device, threads, seconds])
    return _grid(headings, rows)


def _specs(records: Sequence[RunRecord], names: Sequence[str]) -> list[Element]:
    """A table of the keys in which the specs differ, then the first run's spec in full."""
    flat = [_flat(record.spec.model_dump(mode="json", exclude={"backend"})) for record in records]
    keys = {key: None for keys in flat for key in keys}
    rows = [
        [key, *(str(values.get(key, "–")) for values in flat)]
        for key in keys
        if any(values.get(key, KeyError) != flat[0].get(key, KeyError) for values in flat)
    ]
    parts = [_grid(["differs in", *names], rows)] if rows else []
    if len(records) > 1 and not rows:
        parts.append(element("p", "All runs have the same spec, apart from the backend."))
    text = element("pre", config.dump(records[0].spec))
    return [*parts, element("details", element("summary", f"resolved spec of {names[0]}"), text)]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
