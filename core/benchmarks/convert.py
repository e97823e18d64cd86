"""Conversion of a large training state beside ``cp``, and reading beside PyTorch.

The file is a ViT with the state of AdamW, made here. The conversion and ``cp`` take turns on the
same disk; so do reading with the converter and ``torch.load(mmap=True)``, each followed by a copy
of every tensor. Both readings are measured twice: copying alone, and with the checksum of each
tensor. PyTorch itself compares no checksum, and the converter compares all of them. The peak memory
is that of a process that does nothing else.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from triptych import backends
from triptych.core import cli, config, parameters
from triptych.core.benchmarks import child
from triptych.core.config import yaml12
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.errors import UserError
from triptych.core.files import reading, saving
from triptych.core.files.copying import copied, copies, verified
from triptych.core.files.tree import Stored, tensors
from triptych.core.formats import destination
from triptych.core.formats.conversion import Request, plan
from triptych.core.formats.opening import SPEC
from triptych.core.launch import REFERENCE
from triptych.core.machine.resources import peak_memory_mib
from triptych.core.random import stream

TARGETS = {"canonical": "canonical", "safetensors": "canonical", "torch": "torch"}
"""What is written -> the format of it. The first is a folder, the others are files."""
SUFFIXES = {"safetensors": ".safetensors", "torch": ".pth"}
"""End of the name of a file."""
MIB = 2**20
READINGS = {"read": "torch", "read, checked": "torch, checked"}
"""Task of reading -> that of PyTorch which it is compared with."""
SHARD, SLACK = 1.3, 200
"""Limit of the peak memory: this many times the largest file of the result, and MiB."""
COPIES = 3
"""Files of the size of the state that lie on the disk at once, with room to spare."""
NOISE = 2**22
"""Random numbers that the tensors repeat."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench convert``."""
    for name, default, text in (
        ("width", 1024, "of the tokens"),
        ("depth", 24, "blocks"),
        ("heads", 16, "of each block"),
        ("rounds", 3, "times that each is measured"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: {default}"
        )
    parser.add_argument("--to", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME",
                        help=f"what to write: {', '.join(TARGETS)}; default: all")  # fmt: skip
    parser.add_argument(
        "--folder", type=cli.path, help="where the files are made; default: that of the system"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Prints the comparison."""
    if arguments.only:
        name, path = arguments.only
        print(json.dumps(TASKS[name](Path(path))))
        return 0
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: expected at least 1")
    if arguments.folder and not arguments.folder.is_dir():
        raise UserError(f"--folder {arguments.folder}: no such folder")
    with tempfile.TemporaryDirectory(prefix="triptych-bench-", dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments)
    print(json.dumps(result, indent=2) if arguments.json else _table(result))
    return 0


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of each task, and the ratios.

    Raises:
        UserError: the disk is too small.
    """
    spec = _spec(arguments)
    size = 12 * sum(param.size for param in parameters.table(spec))
    free = shutil.disk_usage(folder).free
    if free < COPIES * size:
        raise UserError(
            f"{folder}: {free // MIB} MiB are free, {COPIES * size // MIB} are needed; give "
            "--folder or a smaller --width and --depth"
        )
    source = folder / "state.pth"
    saving.write(source, _state(spec), "torch")
    written = [f"to {name}" for name in dict.fromkeys(arguments.to)]
    peers = list(READINGS.values()) if "torch" in backends.installed() else []
    names = [*written, "cp", *READINGS, *peers]
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for turn in range(arguments.rounds):
        # The order is reversed at every second turn: the second task finds warmer caches.
        for name in names[:: -1 if turn % 2 else 1]:
            rows[name].append(_child(name, source))
    return _result(rows, source.stat().st_size)


def _result(rows: Mapping[str, list[dict[str, float]]], size: int) -> dict[str, Any]:
    def ratio(slow: str, fast: str) -> float:
        pairs = zip(rows[slow], rows[fast], strict=True)
        return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)

    written = [name for name in rows if name.startswith("to ")]
    result: dict[str, Any] = {
        "mib": size / MIB,
        "seconds": {n: statistics.median(r["seconds"] for r in found) for n, found in rows.items()},
        "peak_mib": {n: max(r["peak_mib"] for r in found) for n, found in rows.items()},
        "peak_limit_mib": {name: SHARD * rows[name][0]["shard"] / MIB + SLACK for name in written},
        "self_check_seconds": statistics.median(r["check"] for n in written for r in rows[n]),
        "speed_over_cp": {name: ratio("cp", name) for name in written},
    }
    if set(READINGS.values()) <= rows.keys():
        result["over_torch"] = {name: ratio(peer, name) for name, peer in READINGS.items()}
    return result


def _spec(arguments: argparse.Namespace) -> RunSpec:
    model = {name: getattr(arguments, name) for name in ("width", "depth", "heads")}
    sections = {
        "model": {"name": "vit", **model},
        "method": {"name": "finetune", "classes": 1000},
        "optim": {"name": "adamw"},
        "train": {"steps": 1},
    }
    return config.loads(yaml12.dump(sections), "bench convert")


def _state(spec: RunSpec) -> dict[str, Any]:
    """Weights and moments of random numbers, made when they are written."""
    noise = stream(0, "bench/convert").standard_normal(NOISE, dtype=np.float32)
    shapes = {param.name: param.shape for param in parameters.table(spec)}
    shapes |= {
        f"optimizer.{kind}.{param.name}": param.shape
        for kind in ("exp_avg", "exp_avg_sq")
        for param in parameters.table(spec)
        if param.trainable
    }
    tree: dict[str, Any] = {name: _repeated(noise, shape) for name, shape in shapes.items()}
    step = Stored.of(np.array(1, np.int64))
    return {SPEC: config.dump(spec), **tree, "optimizer.step": step}


def _repeated(noise: Array, shape: tuple[int, ...]) -> Stored:
    return Stored("float32", shape, lambda: np.resize(noise, shape))


def _convert(source: Path, name: str) -> dict[str, float]:
    """The conversion, the size of the largest file of its result, and the time of a self-check."""
    # Imported here, since the reference is slow to import, and ``--help`` does not need it.
    from triptych.core.formats.selfcheck import check

    target = source.with_name(f"converted{SUFFIXES.get(name, '')}")
    start = time.perf_counter()
    made = plan(source, Request(target=TARGETS[name]))
    destination.write(target, made, lambda done: None)
    seconds, peak = time.perf_counter() - start, peak_memory_mib()
    files = [p for p in target.rglob("*") if p.is_file()] if target.is_dir() else [target]
    shard = max(file.stat().st_size for file in files)
    saving.remove(target)
    start = time.perf_counter()
    check(made, REFERENCE)
    checked = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": peak, "shard": shard, "check": checked}


def _cp(source: Path) -> dict[str, float]:
    target = source.with_name("copied")
    start = time.perf_counter()
    subprocess.run(["cp", source, target], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return {"seconds": seconds, "peak_mib": peak_memory_mib()}


def _read(source: Path, *, checked: bool) -> dict[str, float]:
    start = time.perf_counter()
    found = tensors(reading.read(source).tree)
    for _ in copies(found, verified) if checked else (copied(x.bits()) for _, x in found):
        pass
    return {"seconds": time.perf_counter() - start, "peak_mib": peak_memory_mib()}


def _torch(source: Path, *, checked: bool) -> dict[str, float]:
    package = backends.load("torch")
    module = importlib.import_module(f"{package.__name__}.plain.reading")
    start = time.perf_counter()
    module.copy_all(os.fspath(source), checked=checked)
    return {"seconds": time.perf_counter() - start, "peak_mib": peak_memory_mib()}


TASKS: dict[str, Callable[[Path], dict[str, float]]] = {
    **{f"to {name}": partial(_convert, name=name) for name in TARGETS},
    "cp": _cp,
    "read": partial(_read, checked=False),
    "read, checked": partial(_read, checked=True),
    "torch": partial(_torch, checked=False),
    "torch, checked": partial(_torch, checked=True),
}
"""What is measured, by name."""


def _child(name: str, source: Path) -> dict[str, float]:
    """Runs a task in a process of its own."""
    result: dict[str, float] = child.answer(name, ["convert", "--only", name, os.fspath(source)])
    return result


TITLES = {
    "to canonical": "convert to a checkpoint, hashed",
    "to safetensors": "convert to one safetensors file",
    "to torch": "convert to a file of PyTorch, with checksums",
    "cp": "cp",
    "read": "read, copy every tensor",
    "read, checked": "read, compare checksums, copy every tensor",
    "torch": "torch.load(mmap=True), copy every tensor",
    "torch, checked": "the same, with a checksum of every tensor",
}


def _table(result: Mapping[str, Any]) -> str:
    head = f"{'':45}seconds  MiB/s  peak MiB  at most  speed / cp"
    lines = [f"a training state of {result['mib']:.0f} MiB", head]
    for name, seconds in result["seconds"].items():
        speed, peak = result["mib"] / seconds, result["peak_mib"][name]
        line = f"{TITLES[name]:44} {seconds:7.2f} {speed:6.0f} {peak:9.0f}"
        if limit := result["peak_limit_mib"].get(name):
            line += f" {limit:8.0f} {result['speed_over_cp'][name]:11.2f}"
        lines.append(line)
    lines += [
        f"at most: {SHARD} times the largest file that is written, and {SLACK} MiB",
        f"self-check: {result['self_check_seconds']:.2f} s more",
    ]
    for name, value in result.get("over_torch", {}).items():
        lines.append(f"{name} / {READINGS[name]}, speed: {value:.2f}")
    return "\n".join(lines)
