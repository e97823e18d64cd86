"""Evaluation beside the usual alternatives: nearest neighbours and feature extraction.

The search for neighbours takes turns with scikit-learn's brute force and with a loop that compares
all pairs in float64. The extraction of features takes turns with a plain loop in the same
framework, and a step of a linear probe with all its rates with a step of a single rate. The peak
memory of each is measured in a separate process.
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from triptych import backends
from triptych.core import cli, config, launch, parameters
from triptych.core.benchmarks import child, conditions, loop
from triptych.core.benchmarks.step import DEFAULTS
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, Batch, Hyper
from triptych.core.errors import UserError
from triptych.core.evaluation.neighbours import (
    BANK,
    DECIMALS,
    QUERIES,
    largest,
    neighbours,
    unit_rows,
)
from triptych.core.evaluation.subject import Product, on_host, product_of
from triptych.core.machine.resources import peak_memory_mib

PROBE = "moca/v1_0_vit_base_linear"
"""Recipe of a linear probe with 45 rates."""
SMALL = "moco_v3/digits"
"""Recipe of the engine whose products serve the search. Its network does not matter."""
VERSIONS = ("numpy", "scikit-learn", *conditions.FRAMEWORKS)
"""The packages whose versions the figures depend on."""
CLASSES = 10
"""Clusters of the features that are searched."""
Task = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench eval``."""
    parser.add_argument("what", nargs="?", choices=("all", *STAGES), default="all")
    parser.add_argument("-c", "--config", default="moco_v3/vit_small", metavar="FILE")
    parser.add_argument(
        "-o", "--override", dest="overrides", nargs="+", action="extend", default=[]
    )
    cli.add_backend_argument(parser)
    sizes = (
        ("bank", 60000, "labelled images"),
        ("queries", 10000, "images to classify"),
        ("width", 192, "numbers in a feature"),
        ("k", 20, "neighbours"),
        ("images", 64, "images whose features are computed"),
        ("threads", 1, "threads of matrix products"),
        ("rounds", 3, "times that each is measured"),
    )
    for name, default, text in sizes:
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text}; default: {default}"
        )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--only", help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Prints the comparison of each stage."""
    for name in ("bank", "queries", "width", "k", "images", "threads", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: expected at least 1")
    if arguments.k > arguments.bank:
        raise UserError(f"--k {arguments.k}: expected at most --bank {arguments.bank}")
    names = list(STAGES) if arguments.what == "all" else [arguments.what]
    if arguments.only:
        print(json.dumps(_peak(arguments)))
        return 0
    results = {name: _measure(name, arguments) for name in names}
    print(json.dumps(results, indent=2) if arguments.json else _table(results))
    return 0


def _measure(stage: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of each task of a stage, and how much faster the first one is."""
    with threadpool_limits(arguments.threads):
        tasks = STAGES[stage](arguments)
        times: dict[str, list[float]] = {name: [] for name in tasks}
        for turn in range(arguments.rounds):
            # The order is reversed at every second turn: the second task finds warmer caches.
            for name in sorted(tasks, reverse=bool(turn % 2)):
                start = time.perf_counter()
                tasks[name]()
                times[name].append(time.perf_counter() - start)
    first, *others = tasks
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "speed_over": {
            name: statistics.median(b / a for a, b in zip(times[first], times[name], strict=True))
            for name in others
        },
        "peak_mib": {name: _child(stage, name, arguments) for name in tasks},
        **conditions.conditions(arguments.rounds, arguments.threads, VERSIONS),
    }


def _child(stage: str, task: str, arguments: argparse.Namespace) -> float:
    """Peak memory (MiB) of a process that runs one task once."""
    words = ["eval", stage, "--only", task]
    for name in ("config", "bank", "queries", "width", "k", "images", "threads"):
        words += [f"--{name}", str(getattr(arguments, name))]
    words += ["--backend", arguments.backend] if arguments.backend else []
    words += ["-o", *arguments.overrides] if arguments.overrides else []
    return float(child.answer(task, words))


def _peak(arguments: argparse.Namespace) -> float:
    with threadpool_limits(arguments.threads):
        STAGES[arguments.what](arguments)[arguments.only]()
    return peak_memory_mib()


# ---------------------------------------------------------------------------------- neighbours


def _search(arguments: argparse.Namespace) -> dict[str, Task]:
    bank, queries = (
        _clusters(getattr(arguments, name), arguments.width, seed)
        for seed, name in enumerate(("bank", "queries"))
    )
    k, product = arguments.k, _product(arguments)
    return {
        "triptych": lambda: neighbours(bank, queries, k, product=product),
        "scikit-learn": lambda: _scikit_learn(bank, queries, k),
        "all pairs": lambda: _all_pairs(bank, queries, k),
    }


def _product(arguments: argparse.Namespace) -> Product:
    """The products of a backend, as an evaluation takes them, if there is one."""
    if not (arguments.backend or backends.installed()):
        return on_host
    spec = config.load(SMALL, [*DEFAULTS, f"threads={arguments.threads}"])
    state = parameters.initial_state(spec)
    return product_of(launch.open_engine(spec, _backend(arguments), state))


def _clusters(count: int, width: int, seed: int) -> Array:
    """Features (count, width) float32 around ``CLASSES`` centres."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(2).standard_normal((CLASSES, width), np.float32)
    features: Array = rng.standard_normal((count, width), np.float32)
    features += 0.5 * centres[rng.integers(0, CLASSES, count)]
    return features


def _scikit_learn(bank: Array, queries: Array, k: int) -> tuple[Array, Array]:
    from sklearn.neighbors import NearestNeighbors

    bank, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries))
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank)
    distance, index = search.kneighbors(queries)
    return 1 - distance**2 / 2, index


def _all_pairs(bank: Array, queries: Array, k: int) -> tuple[Array, Array]:
    """The loop of earlier versions: float64, and the bank normalised for each block of queries."""
    found, places = [], []
    for start in range(0, len(queries), QUERIES):
        unit = unit_rows(queries[start : start + QUERIES])
        best, index = np.empty((len(unit), 0)), np.empty((len(unit), 0), np.int64)
        for first in range(0, len(bank), BANK):
            block = unit_rows(bank[first : first + BANK])
            similarity = np.hstack([best, np.round(unit @ block.T, DECIMALS)])
            position = np.arange(first, first + len(block))
            index = np.hstack([index, np.broadcast_to(position, (len(unit), len(block)))])
            column = largest(similarity, k)
            best = np.take_along_axis(similarity, column, axis=1)
            index = np.take_along_axis(index, column, axis=1)
        found.append(best)
        places.append(index)
    return np.vstack(found), np.vstack(places)


# ------------------------------------------------------------------------------------ features


def _features(arguments: argparse.Namespace) -> dict[str, Task]:
    spec = config.load(
        arguments.config, [*DEFAULTS, f"threads={arguments.threads}", *arguments.overrides]
    )
    name, images = _backend(arguments), _images(spec, arguments.images)
    launch.load(spec, name)
    engine = launch.open_engine(spec, name, parameters.initial_state(spec))
    module = importlib.import_module(f"triptych.backends.{name}.plain.moco_v3")
    plain = module.PlainLoop(spec)
    return {
        "triptych": lambda: engine.embed(images),
        "plain loop": lambda: plain.features(images),
    }


def _heads(arguments: argparse.Namespace) -> dict[str, Task]:
    one = ("method.rates=[1.0]", "method.weight_decays=[]")
    return {"all rates": _probe_step(arguments), "one rate": _probe_step(arguments, *one)}


def _probe_step(arguments: argparse.Namespace, *overrides: str) -> Task:
    """A training step of the linear probe ``PROBE``."""
    size = (f"threads={arguments.threads}", f"train.batch_size={arguments.images}")
    spec = config.load(PROBE, [*DEFAULTS, *size, *arguments.overrides, *overrides])
    engine = launch.open_engine(spec, _backend(arguments), parameters.initial_state(spec))
    count = arguments.images
    batch = Batch((_images(spec, count),), np.arange(count), np.zeros(count, np.int64))
    wait = loop.waiter(engine)

    def step() -> None:
        engine.train_step(batch, {}, Hyper(step=0, lr=1e-4, weight_decay=0.0, ema=1.0))
        wait()

    return step


def _backend(arguments: argparse.Namespace) -> str:
    """The name that the command line gives, or the first installed backend."""
    names = [arguments.backend] if arguments.backend else list(backends.installed())
    if not names:
        raise UserError("no backend is installed; run: pip install 'triptych[torch]'")
    return names[0]


def _images(spec: RunSpec, count: int) -> Array:
    shape = (count, spec.model.channels, *spec.model.size)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


STAGES: Mapping[str, Callable[[argparse.Namespace], dict[str, Task]]] = {
    "knn": _search,
    "features": _features,
    "heads": _heads,
}
"""Stage -> its tasks by name. The others are compared with the first one."""


def _table(results: Mapping[str, dict[str, Any]]) -> str:
    head = "stage     task           seconds  peak MiB  times as long as the first"
    lines = [conditions.line(next(iter(results.values()))), head]
    for stage, result in results.items():
        for name, seconds in result["seconds"].items():
            ratio = result["speed_over"].get(name)
            shown = "" if ratio is None else f"{ratio:9.2f}"
            peak = result["peak_mib"][name]
            lines.append(f"{stage:9} {name:12} {seconds:9.3f} {peak:9.0f} {shown}".rstrip())
    return "\n".join(lines)
