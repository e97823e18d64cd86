"""The check of a GPU: numbers, determinism, waits, copies and speed, each with a bar.

Each part runs in a process of its own: TF32 is chosen before a framework is imported, and a part
that fails ends no other one. A dry run does small parts on the CPU, in one process.
"""

import argparse
import importlib
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from triptych.core import cli, config, launch
from triptych.core.benchmarks import gpu_numbers, gpu_speed
from triptych.core.benchmarks.gpu_check import Check, Row
from triptych.core.errors import UserError
from triptych.core.files.writing import make_folder, write_atomically

BACKEND = "torch"
"""The framework that this check measures."""
PARTS: dict[str, Callable[[Check], Iterable[Row]]] = {
    part.__name__: part
    for part in (
        *(gpu_speed.machine, gpu_numbers.exact, gpu_numbers.curve, gpu_numbers.single),
        *(gpu_numbers.rough, gpu_numbers.half, gpu_numbers.codes, gpu_numbers.repeats),
        *(gpu_numbers.pixel, gpu_speed.silent, gpu_speed.feeding, gpu_speed.loading),
        *(gpu_speed.nearest, gpu_speed.speed),
    )
}
"""In the order of their run: what time is left is that of the last."""
LATE = "it was not done when the time was over"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench gpu``."""
    parser.add_argument("--device", default="cuda:0", help="of the check (default cuda:0)")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="N", help="after that, stop")
    parser.add_argument(
        "--out", type=cli.path, metavar="DIR", help="write gpu.json and gpu.md there"
    )
    parser.add_argument("--dry-run", action="store_true", help="small parts on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Prints a table. Returns 1 if a part fails, is not reached, or a figure misses its bar.

    Raises:
        UserError: the machine lacks the device or the framework.
    """
    if arguments.part:
        print(json.dumps([asdict(row) for row in rows(arguments, arguments.part)]))
        return 0
    if not 0 <= arguments.minutes < math.inf:
        raise UserError(f"--minutes {arguments.minutes}: expected a number of 0 or more")
    if arguments.out:  # now, and not when all is measured
        make_folder(arguments.out, f"--out {arguments.out}")
    end, found = time.monotonic() + 60 * arguments.minutes, []
    for part in PARTS:
        left = end - time.monotonic()
        result = _result(arguments, part, left) if left > 0 else {"error": "no time was left"}
        if part == "machine" and left > 0 and result.get("error", LATE) != LATE:
            raise UserError(f"bench gpu: {result['error'].removeprefix('error: ')}")
        found.append({"part": part, **result})
    report = {**_machine(arguments), "parts": found, "ok": all(_ok(part) for part in found)}
    text = table(report)
    print(text)
    if arguments.out:
        write_atomically(arguments.out / "gpu.json", json.dumps(report, indent=2))
        write_atomically(arguments.out / "gpu.md", text)
    return 0 if report["ok"] else 1


def rows(arguments: argparse.Namespace, part: str) -> list[Row]:
    """The figures of a part, measured in this process."""
    device = "cpu" if arguments.dry_run else arguments.device
    precision = "tf32" if part == "rough" and device != "cpu" else "float32"
    spec = config.load("moco_v3/digits", [f"device={device}", f"precision={precision}"])
    launch.load(spec, BACKEND).device_of(spec)
    native = importlib.import_module(f"triptych.backends.{BACKEND}.gpu")
    return list(PARTS[part](Check(device, native, BACKEND, arguments.dry_run)))


def _result(arguments: argparse.Namespace, part: str, left: float) -> dict[str, Any]:
    """Rows, or an error in one line, and the seconds they took."""
    begun = time.monotonic()
    if arguments.dry_run:
        result: dict[str, Any] = {"rows": [asdict(row) for row in rows(arguments, part)]}
    else:
        result = _child(arguments, part, left)
    return {**result, "seconds": time.monotonic() - begun}


def _child(arguments: argparse.Namespace, part: str, left: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "triptych.core.cli", "bench", "gpu", "--part", part]
    command += ["--device", arguments.device]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {"error": LATE}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return {"rows": json.loads(done.stdout.splitlines()[-1])}


def _machine(arguments: argparse.Namespace) -> dict[str, Any]:
    device = "cpu" if arguments.dry_run else arguments.device
    return {"device": device, "backend": BACKEND, "python": platform.python_version()}


def _ok(part: dict[str, Any]) -> bool:
    return "error" not in part and all(Row(**row).ok for row in part["rows"])


def table(report: dict[str, Any]) -> str:
    """The report in Markdown, a row for each figure."""
    verdict = "all bars hold" if report["ok"] else "FAILED"
    if report["ok"] and report["device"] == "cpu":
        verdict = "every part ran, which says nothing about a GPU"
    lines = [
        f"{report['backend']} on {report['device']}: {verdict}",
        "",
        "| part | what | value | bar | foreseen |",
        "|---|---|---|---|---|",
    ]
    for part in report["parts"]:
        if "error" in part:
            lines.append(f"| {part['part']} | {part['error']} | FAILED | | |")
        for given in part.get("rows", ()):
            row = Row(**given)
            bars = [] if row.least is None else [f">= {row.least:g}"]
            bars += [] if row.most is None else [f"<= {row.most:g}"]
            foreseen = "" if row.foreseen is None else f"{row.foreseen:g}"
            value = f"{row.value:.4g}" + ("" if row.ok else " FAILED")
            lines.append(
                f"| {part['part']} | {row.what} | {value} | {', '.join(bars)} | {foreseen} |"
            )
    return "\n".join([*lines, ""])
