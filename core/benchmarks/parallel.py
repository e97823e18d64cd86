"""A training step in several processes beside one process: speed, bytes sent, peak memory.

The framework's own launcher starts the processes of each layout. The images per second, from the
median step, are given as a ratio to those of one process with the same threads. The bytes that the
main process sends are counted at its groups (``core.benchmarks.traffic``).
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

from triptych import backends
from triptych.core import cli, config, parameters
from triptych.core.benchmarks import loop, traffic
from triptych.core.benchmarks.step import DEFAULTS, synthetic_batch
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Hyper, evenly
from triptych.core.errors import UserError
from triptych.core.launch import join, load, open_engine
from triptych.core.machine.resources import peak_memory_mib
from triptych.core.methods import METHODS
from triptych.core.parallel.degrees import Degrees

LAYOUTS = (
    "data=2",
    "tensor=2",
    "pipeline=2,micro_batches=4",
    "data=2,shard_optimizer=true",
)
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "torch": ("torch.distributed.run", "--nproc_per_node={world}", "--master_port={port}"),
    "oneflow": ("oneflow.distributed.launch", "--nproc_per_node={world}", "--master_port={port}"),
    "paddle": ("paddle.distributed.launch", "--nproc_per_node={world}", "--log_dir={folder}/log"),
}
"""Backend -> its launcher's module and options."""
MAIN = "import sys\nfrom triptych.core.cli import main\nsys.exit(main())\n"
LIMIT = 3600.0
"""Seconds after which a layout counts as hanging."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench parallel``."""
    parser.add_argument("-c", "--config", default="moco_v3/vit_small", metavar="FILE")
    parser.add_argument(
        "-o", "--override", dest="overrides", nargs="+", action="extend", default=[]
    )
    cli.add_backend_argument(parser)
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=LAYOUTS,
        metavar="KEY=VALUE[,...]",
        help=f"keys of the section parallel; default: {' '.join(LAYOUTS)}",
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each")
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        metavar="N",
        help="measure all layouts in turn N times, where the machine's speed changes (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--launched", type=Path, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Prints a line for one process and for each layout, of one backend or of all."""
    for option in ("rounds", "repeats"):
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option} {getattr(arguments, option)}: expected at least 1")
    if arguments.launched:
        return _one_of_several(arguments)
    names = [arguments.backend] if arguments.backend else list(backends.installed())
    rows = [row for name in names for row in _rows(name, arguments)]
    print(json.dumps(rows, indent=2) if arguments.json else _table(rows))
    return 0


def _spec(arguments: argparse.Namespace, keys: Sequence[str] = ()) -> RunSpec:
    overrides = [*DEFAULTS, "threads=1", *arguments.overrides, *keys]
    return config.load(arguments.config, overrides)


def _rows(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures of one process, then those of each layout."""
    layouts = {
        layout: [f"parallel.{pair}" for pair in layout.split(",") if pair]
        for layout in ("", *arguments.layouts)
    }
    for keys in layouts.values():
        _spec(arguments, keys)  # all mistakes are told before the first measurement
    turns = [
        [_launch(name, arguments, keys) for keys in layouts.values()]
        for _ in range(arguments.repeats)
    ]
    rows: list[dict[str, Any]] = []
    for layout, *figures in zip(layouts, *turns, strict=True):
        median = statistics.median(chain.from_iterable(one["steps"] for one in figures))
        row = {"backend": name, "layout": layout or "one process", **figures[0]}
        row.update(seconds=median, images_per_second=row["images"] / median)
        row["peak_mib"] = max(one["peak_mib"] for one in figures)
        rows.append(row)
        rows[-1]["speed"] = rows[0]["seconds"] / median
    return rows


def _launch(name: str, arguments: argparse.Namespace, keys: list[str]) -> dict[str, Any]:
    """The figures of one layout, from processes of its own.

    Raises:
        UserError: a process failed.
    """
    overrides = [*arguments.overrides, *keys]
    world = Degrees.of(_spec(arguments, keys)).world
    with tempfile.TemporaryDirectory() as folder:
        script, result = Path(folder) / "bench.py", Path(folder) / "result.json"
        script.write_text(MAIN)
        command = [sys.executable, str(script), "bench", "parallel", "-c", arguments.config]
        command += ["--backend", name, "--rounds", str(arguments.rounds)]
        command += ["--launched", str(result), *(["-o", *overrides] if overrides else [])]
        if world > 1:
            given = {"world": world, "port": _free_port(), "folder": folder}
            launcher = [word.format(**given) for word in LAUNCHERS[name]]
            command[1:1] = ["-m", *launcher]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        if done.returncode or not result.exists():
            lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise UserError(f"{name}, {' '.join(keys)}: {(lines or ['error: failed'])[0][7:]}")
        figures: dict[str, Any] = json.loads(result.read_text())
        return figures


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _one_of_several(arguments: argparse.Namespace) -> int:
    """One of the processes of a layout. The main one writes the figures."""
    spec, name = _spec(arguments), arguments.backend
    load(spec, name)
    with closing(join(spec, name)) as ranks:
        before = peak_memory_mib()
        state = parameters.initial_state(spec)
        with closing(open_engine(spec, name, state, ranks=ranks)) as engine:
            del state
            wait, size = loop.waiter(engine), spec.train.batch_size
            rows = evenly(size, ranks.replicas.rank, ranks.replicas.count)
            batches = [synthetic_batch(spec, seed).part(rows) for seed in range(2)]
            seconds, sent = [], traffic.count(ranks)
            for i in range(arguments.rounds + 1):
                sent.clear()
                draws, start = METHODS[spec.method.name].draws(spec, i), time.perf_counter()
                engine.train_step(batches[i % 2], draws, Hyper(i, 1e-4, 0.1, 0.99))
                wait()
                seconds.append(time.perf_counter() - start)
        if ranks.is_main:
            figures = {
                "processes": ranks.world,
                "images": size,
                "steps": seconds[1:],
                "sent": dict(sent),
                "least": traffic.least(spec),
                "peak_mib": peak_memory_mib() - before,
            }
            arguments.launched.write_text(json.dumps(figures))
    return 0


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "backend  layout                       step s   speed    MiB   sent MiB by group, of least"
    ]
    for row in rows:
        sent = [
            f"{group} {size / 2**20:.2f}"
            + (f" ({size / row['least'][group]:.2f})" if group in row["least"] else "")
            for group, size in row["sent"].items()
        ]
        figures = f"{row['seconds']:8.3f} {row['speed']:7.2f} {row['peak_mib']:6.0f}"
        lines.append(
            f"{row['backend']:8} {row['layout']:27} {figures}   {', '.join(sent)}".rstrip()
        )
    return "\n".join(lines)
