"""The text of docs/results.md."""

import platform
from collections.abc import Iterator
from pathlib import Path

from triptych.core.files.writing import make_folder, write_atomically
from triptych.core.machine.environment import cores
from triptych.core.results.answers import Record, shell
from triptych.core.results.table import COLUMNS, INITIAL, TRAINED, Cell, Job, Line, Table, jobs

MISSING = "not run yet"
MAIN = (("k-NN", "all"), ("linear probe", "1 %"), ("fine-tuning", "1 %"), ("fine-tuning", "all"))
"""Protocol and labels of the rows in the summary."""


def write(tables: list[Table], record: Record, page: Path) -> None:
    """Writes the page. Rows without an answer say so.

    Raises:
        UserError: the page cannot be written.
    """
    make_folder(page.parent, f"--page {page}")
    write_atomically(page, "\n".join(_page(tables, record)) + "\n")


def _page(tables: list[Table], record: Record) -> Iterator[str]:
    yield "# Results on Fashion-MNIST"
    yield ""
    yield "`make results` measures these numbers and writes this page. Accuracies are top-1, in"
    yield "percent, on the 10,000 test images, of one seed: a few tenths are no difference."
    yield "Times are wall times, with whatever else the machine had to do."
    yield "[results.json](results.json) keeps what is measured: remove a command there, and"
    yield "`make results` runs it again."
    yield ""
    yield from _machine(tables, record)
    yield ""
    yield from _summary(tables, record)
    for table in tables:
        yield ""
        yield from _section(table, record)


def _machine(tables: list[Table], record: Record) -> Iterator[str]:
    answers = [answer for job in jobs(tables) if (answer := record.answer(job))]
    days = sorted(answer.day for answer in answers)
    stamps = [answer.stamp for answer in answers if answer.stamp]
    yield f"- Machine: {platform.machine()}, {cores()} cores, {platform.system()}, CPU only."
    if stamps:
        named = {"python": platform.python_version(), **stamps[0]["versions"]}
        versions = ", ".join(f"{name} {number}" for name, number in named.items())
        threads = ", ".join(str(n) for n in sorted({stamp["threads"] for stamp in stamps}))
        seeds = ", ".join(str(n) for n in sorted({stamp["seed"] for stamp in stamps}))
        yield f"- Versions: {versions}. Threads: {threads}. Seed: {seeds}."
    if days:
        yield f"- Measured: {' to '.join(dict.fromkeys((days[0], days[-1])))}."
    yield f"- Commands: {len(answers)} of {len(jobs(tables))} run so far."


def _summary(tables: list[Table], record: Record) -> Iterator[str]:
    """The main numbers of each trained encoder, and in how many rows it is ahead."""
    heads = [f"{protocol}, {labels}" for protocol, labels in MAIN]
    yield f"| encoder | pretraining | {' | '.join(heads)} | ahead of random | of all in its row |"
    yield "|---" * (len(heads) + 4) + "|"
    for table in tables:
        answer = record.answer(table.pretraining)
        taken = f"{answer.seconds / 60:.1f} min" if answer else MISSING
        rows = {(line.protocol, line.labels): line for line in table.lines}
        numbers = [_number(record, rows[key].cells[TRAINED]) for key in MAIN]
        counts = _ahead(table, record)
        yield f"| {table.title} | {taken} | {' | '.join(numbers)} | {counts[0]} | {counts[1]} |"


def _ahead(table: Table, record: Record) -> tuple[str, str]:
    """The rows in which the trained encoder beats random weights, and those where it beats all."""
    measured = [line for line in table.lines if record.score(line.cells[TRAINED]) is not None]
    initial = [line for line in measured if _known(record, line, INITIAL)]
    whole = [line for line in measured if all(_known(record, line, name) for name in line.cells)]
    ahead = sum(INITIAL not in _above(record, line) for line in initial)
    best = sum(not _above(record, line) for line in whole)
    return f"{ahead} of {len(initial)} rows", f"{best} of {len(whole)} rows"


def _known(record: Record, line: Line, column: str) -> bool:
    return column in line.cells and record.score(line.cells[column]) is not None


def _above(record: Record, line: Line) -> list[str]:
    """The columns that the trained encoder does not beat."""
    trained = record.score(line.cells[TRAINED])
    others = {name: record.score(cell) for name, cell in line.cells.items() if name != TRAINED}
    return [
        name
        for name, value in others.items()
        if trained is not None and value is not None and value >= trained
    ]


def _section(table: Table, record: Record) -> Iterator[str]:
    yield f"## {table.title}"
    yield ""
    yield f"| protocol | labels | {' | '.join(COLUMNS.values())} | the trained encoder |"
    yield "|---" * (len(COLUMNS) + 3) + "|"
    for line in table.lines:
        numbers = [_number(record, line.cells.get(column)) for column in COLUMNS]
        verdict = _verdict(record, line)
        yield f"| {line.protocol} | {line.labels} | {' | '.join(numbers)} | {verdict} |"
    yield ""
    yield "The commands:"
    yield ""
    yield "```sh"
    yield from _commands(table, record)
    yield "```"


def _number(record: Record, cell: Cell | None) -> str:
    if cell is None:
        return "–"
    value = record.score(cell)
    return MISSING if value is None else f"{100 * value:.1f}"


def _verdict(record: Record, line: Line) -> str:
    """What the row shows, as far as it is measured."""
    if record.score(line.cells[TRAINED]) is None:
        return ""
    if above := _above(record, line):
        return f"**does not beat {' and '.join(COLUMNS[name] for name in above)}**"
    measured = all(record.score(cell) is not None for cell in line.cells.values())
    return "beats all" if measured else "beats those measured"


def _commands(table: Table, record: Record) -> Iterator[str]:
    """Every command once, below the rows and columns that it gives."""
    uses: dict[Job, list[str]] = {table.pretraining: ["pretraining"]}
    for line in table.lines:
        for column, cell in line.cells.items():
            row = f"{line.protocol}, {line.labels}: {COLUMNS[column]}"
            uses.setdefault(cell.job, []).append(row)
    for job, rows in uses.items():
        answer = record.answer(job)
        yield f"# {'; '.join(rows)}" + (f" ({answer.seconds:.0f} s)" if answer else "")
        yield shell(job)
