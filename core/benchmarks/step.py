"""A training step beside a plain loop of the same computation in the same framework.

Both run in one process and take turns, so that other work of the machine slows both. The peak
memory of each is measured in a separate process. The benchmark also measures what the training loop
adds to the engine's steps, and for MOCA a step of MoCo v3 on the same encoder. It gives ratios,
since only ratios can be compared between machines.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from triptych import backends
from triptych.core import cli, config, launch, parameters
from triptych.core.benchmarks import child, loop
from triptych.core.benchmarks.cost import COUNTED, step_flops
from triptych.core.config.spec import RESNET_PRESETS, EncoderSpec, ResnetSpec, RunSpec, VitSpec
from triptych.core.contracts import Batch, Hyper
from triptych.core.engine import Engine
from triptych.core.errors import UserError
from triptych.core.machine.resources import cpu_threads, peak_memory_mib
from triptych.core.methods import METHODS

DEFAULTS = (
    "device=cpu",
    "precision=float32",
    "train.batch_size=8",
    "train.steps=1000",
    "train.epochs=null",
    "batch_norm.virtual_ranks=1",
)
"""Overrides of the recipe, e.g. a batch that fits a small machine."""
LOGGED = 2
"""Number of logging intervals over which the training loop is measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench step``."""
    parser.add_argument("-c", "--config", default="moco_v3/vit_small", metavar="FILE")
    parser.add_argument(
        "-o", "--override", dest="overrides", nargs="+", action="extend", default=[]
    )
    cli.add_backend_argument(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps of each")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--part", choices=("both", "engine", "plain"), help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Prints the comparison for one backend, or for all that are installed."""
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: expected at least 1")
    spec = config.load(arguments.config, [*DEFAULTS, *arguments.overrides])
    plain_module(spec)
    if arguments.part:
        print(json.dumps(_measure(spec, arguments.backend, arguments.part, arguments.rounds)))
        return 0
    names = [arguments.backend] if arguments.backend else list(backends.installed())
    if not names:
        raise UserError("no backend is installed; run: pip install 'triptych[torch]'")
    rows = [_row(name, arguments) for name in names]
    by_name = {row["backend"]: row for row in rows}
    for row in rows:
        if "torch" in by_name:
            row["time_over_torch"] = row["engine_seconds"] / by_name["torch"]["engine_seconds"]
    print(json.dumps(rows, indent=2) if arguments.json else _table(spec, rows))
    return 0


def _vit(model: EncoderSpec) -> bool:
    return isinstance(model, VitSpec) and model.stem == "patch"


def _resnet(model: EncoderSpec) -> bool:
    if not isinstance(model, ResnetSpec) or (model.stem, model.width) != ("imagenet", 64):
        return False
    return RESNET_PRESETS.get(model.name) == {"block": model.block, "depths": model.depths}


PLAIN: dict[str, tuple[str, Callable[[EncoderSpec], bool]]] = {
    "moco_v1": ("moco", _resnet),
    "moco_v2": ("moco", _resnet),
    "moco_v3": ("moco_v3", _vit),
    "moca": ("moca", _vit),
}
"""Method -> module of its plain loop, and whether that loop can build an encoder."""
BESIDE_MOCO_V3 = ("moca",)
"""Methods whose step is measured beside a step of MoCo v3 on the same encoder."""


def plain_module(spec: RunSpec) -> str:
    """Name of the module in ``backends.*.plain`` with the plain loop of the spec's method.

    Raises:
        UserError: there is no plain loop for the spec's encoder.
    """
    model = spec.model
    module, builds = PLAIN[spec.method.name]
    if builds(model):
        return module
    raise UserError(
        f"bench step: there is no plain loop of {spec.method.name} on {model.name} (stem "
        f"{model.stem}) to compare with; take MoCo v3 on a ViT, or v1 or v2 on a named ResNet"
    )


def _row(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    both, engine = (_child(name, part, arguments) for part in ("both", "engine"))
    row = {
        "backend": name,
        "engine_seconds": both["engine"],
        "engine_peak_mib": engine["peak_mib"],
        "loop_over_bare": both["loop_over_bare"],
    }
    if "plain" in both:
        plain = _child(name, "plain", arguments)
        row |= {
            "plain_seconds": both["plain"],
            "speed_over_plain": both["plain_over_engine"],
            "plain_peak_mib": plain["peak_mib"],
            "memory_over_plain": engine["peak_mib"] / plain["peak_mib"],
        }
    if "moco_v3" in both:
        row |= {"moco_v3_seconds": both["moco_v3"], "moco_v3_time": both["moco_v3_over_engine"]}
    return row


def _child(name: str, part: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one part in a separate process, so that the peak memory is that part's alone."""
    words = ["step", "-c", arguments.config]
    words += ["--backend", name, "--part", part, "--rounds", str(arguments.rounds)]
    words += ["-o", *arguments.overrides] if arguments.overrides else []
    result: dict[str, Any] = child.answer(name, words)
    return result


def _measure(spec: RunSpec, name: str, part: str, rounds: int) -> dict[str, Any]:
    batches = [synthetic_batch(spec, i) for i in range(2)]
    steps: dict[str, Callable[[int], None]] = {}
    plain = f"triptych.backends.{name}.plain.{plain_module(spec)}"
    if part != "plain":
        engine = _engine(spec, name)
        steps["engine"] = _engine_step(engine, batches)
    if part in ("both", "plain") and importlib.util.find_spec(plain):
        launch.load(spec, name)
        steps["plain"] = _plain_step(importlib.import_module(plain).PlainLoop(spec), batches)
    if part == "both" and spec.method.name in BESIDE_MOCO_V3:
        steps["moco_v3"] = _engine_step(_engine(moco_v3_twin(spec), name), batches)
    times = _alternate(steps, rounds)
    result: dict[str, Any] = {k: statistics.median(v) for k, v in times.items()}
    for other in times.keys() - {"engine"} if part == "both" else ():
        pairs = zip(times[other], times["engine"], strict=True)
        result[f"{other}_over_engine"] = statistics.median(a / b for a, b in pairs)
    if part == "both":
        result["loop_over_bare"] = loop.over_bare(spec, engine, batches, rounds=LOGGED)
    result["peak_mib"] = peak_memory_mib()
    return result


def _engine(spec: RunSpec, name: str) -> Engine:
    return launch.open_engine(spec, name, parameters.initial_state(spec))


def moco_v3_twin(spec: RunSpec) -> RunSpec:
    """MoCo v3's recipe with the encoder, batch and precision of another spec."""
    model = spec.model.model_dump(mode="json", exclude={"init", "freeze_patch_embed"})
    sections = {"model": model, "train": {"batch_size": spec.train.batch_size}}
    overrides = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in sections.items()
        for key, value in values.items()
    ]
    shared = [f"precision={spec.precision}", f"threads={json.dumps(spec.threads)}"]
    return config.load("moco_v3/vit_small", [*DEFAULTS, *overrides, *shared])


def _alternate(steps: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step. The steps take turns; the first turn warms up and is not timed."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        # The order is reversed at every second turn: the second step finds warmer caches.
        for name in sorted(steps, reverse=bool(i % 2)):
            start = time.perf_counter()
            steps[name](i)
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def _engine_step(engine: Engine, batches: list[Batch]) -> Callable[[int], None]:
    wait = loop.waiter(engine)

    def step(i: int) -> None:
        draws = METHODS[engine.spec.method.name].draws(engine.spec, i)
        engine.train_step(batches[i % 2], draws, _hyper(i))
        wait()

    return step


def _plain_step(loop: Any, batches: list[Batch]) -> Callable[[int], None]:
    def step(i: int) -> None:
        loop.step(batches[i % 2], _hyper(i))
        loop.wait()

    return step


def _hyper(step: int) -> Hyper:
    return Hyper(step=step, lr=1e-4, weight_decay=0.1, ema=0.99)


def synthetic_batch(spec: RunSpec, seed: int) -> Batch:
    """A batch of normal images."""
    rng = np.random.default_rng(seed)
    n = spec.train.batch_size
    shape = (n, spec.model.channels, *spec.model.size)
    views = tuple(rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    return Batch(views, np.arange(n, dtype=np.int64))


def _table(spec: RunSpec, rows: list[dict[str, Any]]) -> str:
    head = (
        f"one training step: {spec.model.name} {spec.model.size[0]}x{spec.model.size[1]}, batch "
        f"{spec.train.batch_size}, {spec.precision}, {cpu_threads(spec)} threads"
    )
    lines = [
        head,
        "backend   step s   plain s  speed/plain   MiB  memory/plain  loop/bare  time/torch",
    ]
    for row in rows:
        figures = (
            ("engine_seconds", "7.3f"),
            ("plain_seconds", "9.3f"),
            ("speed_over_plain", "12.3f"),
            ("engine_peak_mib", "5.0f"),
            ("memory_over_plain", "13.3f"),
            ("loop_over_bare", "10.3f"),
            ("time_over_torch", "11.2f"),
        )
        cells = [_cell(row.get(name), form) for name, form in figures]
        lines.append(" ".join([f"{row['backend']:8}", *cells]))
    return "\n".join([*lines, *_costs(spec, rows)])


def _cell(value: float | None, form: str) -> str:
    width = int(form.partition(".")[0])
    return "-".rjust(width) if value is None else f"{value:{form}}"


def _costs(spec: RunSpec, rows: list[dict[str, Any]]) -> list[str]:
    """Lines with counted cost and measured time of MOCA and MoCo v3 on the same encoder."""
    if spec.method.name not in BESIDE_MOCO_V3:
        return []
    name = spec.method.name
    cost, twin_cost = step_flops(spec), step_flops(moco_v3_twin(spec))
    lines = [
        f"counted: {name} {cost / 1e9:.2f} GFLOPs, moco_v3 on the same encoder "
        f"{twin_cost / 1e9:.2f}: {twin_cost / cost:.2f} times as much ({COUNTED})"
    ]
    for row in rows:
        lines.append(
            f"measured: {row['backend']} {name} {row['engine_seconds']:.3f} s, moco_v3 "
            f"{row['moco_v3_seconds']:.3f} s: {row['moco_v3_time']:.2f} times as long"
        )
    return lines
