"""The page docs/speed.md: the ratios of all other benchmarks, with the commands that give them.

Each command's answer is kept in a folder, so the measurement may be ended and started again.
"""

import argparse
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from triptych.core import cli
from triptych.core.benchmarks.conditions import FRAMEWORKS, listed, versions
from triptych.core.errors import UserError
from triptych.core.files.writing import make_folder, write_atomically
from triptych.core.machine.environment import cores
from triptych.core.machine.resources import processor_name

Ratios = Iterator[tuple[str, float]]
"""(what is compared with what, how many times as fast the first is)."""


@dataclass(frozen=True)
class Measurement:
    """A benchmark and what the page takes from it.

    Attributes:
        title: what is measured.
        words: of the command, after ``bench``.
        ratios: of the command's JSON.
    """

    title: str
    words: tuple[str, ...]
    ratios: Callable[[Any], Ratios]

    def file(self, folder: Path) -> Path:
        """The file with the answer of this command."""
        return folder / f"{'-'.join(self.words).replace('/', '-')}.json"


def _of_steps(rows: list[Mapping[str, Any]]) -> Ratios:
    for row in rows:
        if "speed_over_plain" in row:
            yield f"{row['backend']} beside a plain loop of it", row["speed_over_plain"]
    for row in rows:
        if row.get("time_over_torch", 1.0) != 1.0:
            yield f"{row['backend']} beside torch", 1 / row["time_over_torch"]


def _of_layouts(rows: list[Mapping[str, Any]]) -> Ratios:
    for row in rows[1:]:
        yield f"{row['backend']}, {row['layout']} beside one process", row["speed"]


def _of_loaders(result: Mapping[str, Any]) -> Ratios:
    yield "triptych beside torchvision's DataLoader", result["ratio"]


def _of_evaluations(stages: Mapping[str, Any]) -> Ratios:
    for result in stages.values():
        first = next(iter(result["seconds"]))
        for name, ratio in result["speed_over"].items():
            yield f"{first} beside {name}", ratio


def _of_files(result: Mapping[str, Any]) -> Ratios:
    for name, ratio in result["speed_over_cp"].items():
        yield f"a conversion {name} beside cp", ratio
    for name, ratio in result.get("over_torch", {}).items():
        yield f"{name} beside torch.load(mmap=True)", ratio


CONDITIONS = "conditions.json"
"""The file with machine and versions, beside the answers."""
PACKAGES = (*FRAMEWORKS, "torchvision", "pillow", "numba", "numpy", "scikit-learn")
STEP_RECIPES = ("moco_v3/vit_small", "moco_v2/resnet50")
THREADS = 1
"""Of each process that computes, in all measurements."""
STEP = ("--rounds", "3", "-o", f"threads={THREADS}", "log.every=2")
"""Options of a step. The page leaves out the training loop, so its interval may be short."""
WORDS = ("method.new_words=8", "method.word_ranks=1")
LARGE = ("moca/v1_0_vit_base", "--backend", "torch", *STEP, *WORDS)
"""A recipe whose steps are long, with options: it is measured last, and in PyTorch alone. Its small
batch has fewer images than the recipe takes words."""
PARALLEL_RECIPES = (
    ("moco_v3/vit_small",),
    ("moco_v2/resnet50", "model.name=resnet18", "batch_norm.virtual_ranks=2"),
)
SMALL = ("model.image_size=96", "train.batch_size=128")
TURNS = ("--backend", "torch", "--layouts", "data=2", "--rounds", "2", "--repeats", "3")
MEASUREMENTS = (
    *(Measurement(f"A step of {c}", ("step", "-c", c, *STEP), _of_steps) for c in STEP_RECIPES),
    *(
        Measurement(
            f"A step of {', '.join((recipe, *SMALL, *changes))}",
            ("parallel", "-c", recipe, *TURNS, "-o", *SMALL, *changes),
            _of_layouts,
        )
        for recipe, *changes in PARALLEL_RECIPES
    ),
    Measurement("Two views of JPEG files", ("loader",), _of_loaders),
    Measurement("Neighbours", ("eval", "knn"), _of_evaluations),
    Measurement("Features", ("eval", "features"), _of_evaluations),
    Measurement("A step of a linear probe's 45 rates", ("eval", "heads"), _of_evaluations),
    Measurement("Files of a training state", ("convert", "--depth", "6"), _of_files),
    Measurement(f"A step of {LARGE[0]}", ("step", "-c", *LARGE), _of_steps),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench speed``."""
    parser.add_argument("--answers", type=cli.path, default=Path("runs/speed"), metavar="DIR")
    parser.add_argument("--page", type=cli.path, default=Path("docs/speed.md"), metavar="FILE")
    parser.add_argument("--write-only", action="store_true", help="measure nothing")


def run(arguments: argparse.Namespace) -> int:
    """Measures what is missing, and writes the page after each command.

    Raises:
        UserError: a command fails, an answer is damaged or of other conditions, or a file cannot be
            written.
    """
    if not arguments.write_only:
        _keep_conditions(arguments.answers)
    _write(arguments)  # before hours of measuring: the page can be written, the answers be read
    for measurement in () if arguments.write_only else MEASUREMENTS:
        if not measurement.file(arguments.answers).exists():
            cli.say(_shell(measurement))
            _measure(measurement, arguments.answers)
            _write(arguments)
    cli.say(f"wrote {arguments.page}")
    return 0


def _shell(measurement: Measurement) -> str:
    return f"python tools/bench.py {shlex.join(measurement.words)}"


def _measure(measurement: Measurement, folder: Path) -> None:
    name, *words = measurement.words
    command = [sys.executable, "-m", "triptych.core.cli", "bench", name, "--json", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"status {done.returncode} of: {_shell(measurement)}")
    write_atomically(measurement.file(folder), done.stdout)


def _conditions() -> dict[str, str]:
    """Machine and versions, as the page says them."""
    machine = f"{processor_name()}, {cores()} cores, {platform.system()}, CPU only"
    return {"Machine": machine, "Versions": listed(versions(PACKAGES))}


def _keep_conditions(folder: Path) -> None:
    """Writes down machine and versions of the answers, which must be the same for all of them."""
    file, own = folder / CONDITIONS, _conditions()
    make_folder(folder, f"--answers {folder}")
    if not file.exists():
        write_atomically(file, json.dumps(own, indent=2))
    for name, there in _kept_conditions(folder).items():
        if there != own[name]:
            raise UserError(
                f"{file}: {name} of these answers: {there}; here: {own[name]}; "
                "set --answers to another folder"
            )


def _kept_conditions(folder: Path) -> dict[str, str]:
    """Machine and versions of the answers. Without answers, those of this process."""
    file = folder / CONDITIONS
    if not file.exists():
        return _conditions()
    try:
        kept = json.loads(file.read_text())
        return {name: str(kept[name]) for name in _conditions()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged; set --answers to another folder") from error


def _write(arguments: argparse.Namespace) -> None:
    make_folder(arguments.page.parent, f"--page {arguments.page}")
    write_atomically(arguments.page, "\n".join(_page(arguments.answers)) + "\n")


def _page(folder: Path) -> Iterator[str]:
    yield "# Speed"
    yield ""
    yield "`make bench` measures these ratios and writes this page. Both sides of a ratio take"
    yield "turns in one run; above 1 the first one is faster. Seconds say little about another"
    yield "machine, so there are none."
    yield ""
    for name, found in _kept_conditions(folder).items():
        yield f"- {name}: {found}."
    days = sorted(_day(file) for m in MEASUREMENTS if (file := m.file(folder)).exists())
    if days:
        yield f"- Measured: {' to '.join(dict.fromkeys((days[0], days[-1])))}."
    yield ""
    yield "| what | beside what | times as fast | threads | command |"
    yield "|---|---|---|---|---|"
    for measurement in MEASUREMENTS:
        for beside, ratio in _ratios(measurement, folder):
            cells = (measurement.title, beside, ratio, str(THREADS))
            yield f"| {' | '.join(cells)} | `{_shell(measurement)}` |"


def _day(file: Path) -> str:
    return date.fromtimestamp(file.stat().st_mtime).isoformat()


def _ratios(measurement: Measurement, folder: Path) -> Iterator[tuple[str, str]]:
    """What is compared with what, and the ratio as text."""
    file = measurement.file(folder)
    if not file.exists():
        yield "", "not run yet"
        return
    try:
        found = dict(measurement.ratios(json.loads(file.read_text())))
        if not (found and all(0 < ratio < math.inf for ratio in found.values())):
            raise ValueError(f"ratios {found}")
    # An empty table ends a generator early, which is a RuntimeError.
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise UserError(f"{file}: damaged; remove it, and it is measured again") from e
    yield from ((beside, f"{ratio:.2f}") for beside, ratio in found.items())
