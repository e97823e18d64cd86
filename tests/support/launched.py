"""Several processes that compute the steps of some specs together, as a launcher starts them.

The processes are started once for all cases, since importing a framework takes longer than a case.

    python tests/support/launched.py FOLDER BACKEND [WORLD]

is one of the processes. With WORLD it imports the framework and forks into so many processes, which
PyTorch allows: then the framework is imported once.
"""

import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from support.native import draws, hyper, lively_state, random_batch
from support.shares import share

from triptych import backends
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, Ranks
from triptych.core.launch import join, load

LIMIT = 240.0
"""Seconds after which the processes count as hanging."""
SUPPORT = Path(__file__).resolve().parent
Record = dict[str, Array]


def free_ports(count: int) -> list[int]:
    """Ports at which nobody listens now.

    They are below those that Linux gives to connections, one of which might have a port before the
    process that is to listen there.
    """
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(20000, 32000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)


def variables(backend: str, rank: int, world: int, ports: Sequence[int]) -> dict[str, str]:
    """What the framework's launcher gives to a process.

    Args:
        ports: at least ``world`` + 1 ports.
    """
    if backend != "paddle":
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": ports[0]}
        return {"MASTER_ADDR": "127.0.0.1", **{name: str(n) for name, n in numbers.items()}}
    ends = [f"127.0.0.1:{port}" for port in ports[1 : world + 1]]
    return {
        "PADDLE_TRAINER_ID": str(rank),
        "PADDLE_RANK_IN_NODE": str(rank),
        "PADDLE_TRAINERS_NUM": str(world),
        "PADDLE_TRAINER_ENDPOINTS": ",".join(ends),
        "PADDLE_CURRENT_ENDPOINT": ends[rank],
        "PADDLE_MASTER": f"127.0.0.1:{ports[0]}",
        "PADDLE_DISTRI_BACKEND": "gloo",
    }


def environment(backend: str, rank: int, world: int, ports: Sequence[int]) -> dict[str, str]:
    """The environment of a process, which finds the sources and the tests' helpers."""
    paths = [str(SUPPORT.parent), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **variables(backend, rank, world, ports)}


def start(
    command: Sequence[str], backend: str, world: int, **options: Any
) -> list["subprocess.Popen[str]"]:
    """Starts a command in several processes, in the order of their ranks.

    Args:
        options: of ``subprocess.Popen``.
    """
    ports = free_ports(world + 1)
    return [
        subprocess.Popen(
            command, env=environment(backend, rank, world, ports), text=True, **options
        )
        for rank in range(world)
    ]


def together(
    backend: str,
    world: int,
    cases: Mapping[str, RunSpec],
    folder: Path,
    count: int = 5,
    limit: float = LIMIT,
) -> dict[str, list[Record]]:
    """The record of each case on each of several processes.

    Args:
        cases: name -> spec, whose degrees multiply to ``world``.
        folder: takes the files that the processes exchange with this one.
        count: number of steps.
        limit: seconds after which the processes count as hanging.

    Raises:
        AssertionError: a process failed.
    """
    specs = {name: spec.model_dump(mode="json") for name, spec in cases.items()}
    ports = free_ports(len(cases))
    (folder / "cases.json").write_text(json.dumps({"specs": specs, "ports": ports, "count": count}))
    command = [sys.executable, __file__, str(folder), backend]
    if backend == "torch":
        processes = start([*command, str(world)], backend, 1, stderr=subprocess.PIPE)
    else:
        processes = start(command, backend, world, stderr=subprocess.PIPE)
    try:
        errors = [process.communicate(timeout=limit)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(process.returncode for process in processes):
        raise AssertionError("\n".join(errors))
    return {
        name: [dict(np.load(folder / f"{name}.{rank}.npz")) for rank in range(world)]
        for name in cases
    }


def trained(
    package: ModuleType, spec: RunSpec, count: int, ranks: Ranks = ALONE
) -> dict[str, Array]:
    """Losses, metrics, features, gradients and state of ``count`` steps, by name and step."""
    engine, record = package.build(spec, lively_state(spec), ranks), {}
    for step in range(count):
        drawn = draws(spec, step)
        part = share(random_batch(spec, step), drawn, ranks.replicas)
        values, gradients = engine.trace_step(part, drawn, hyper())
        for name, array in {**values, **{f"grad/{n}": g for n, g in gradients.items()}}.items():
            record[f"{name}/{step}"] = array
    record.update(engine.export_state())
    engine.close()
    return record


def compute(folder: Path, backend: str) -> None:
    """One of the processes: computes all cases and writes their records."""
    given = json.loads((folder / "cases.json").read_text())
    for (name, content), port in zip(given["specs"].items(), given["ports"], strict=True):
        spec = RunSpec.model_validate(content)
        if backend == "torch":  # it leaves the group of processes after each case
            os.environ["MASTER_PORT"] = str(port)
        package = load(spec, backend)
        with closing(join(spec, backend)) as ranks:
            record = trained(package, spec, given["count"], ranks)
            np.savez(folder / f"{name}.{ranks.rank}.npz", **record)


def fork(folder: Path, backend: str, world: int) -> int:
    """Forks into ``world`` processes. Returns 1 if one of them failed."""
    backends.load(backend)
    context, children = multiprocessing.get_context("fork"), []
    for rank in range(world):
        os.environ.update(variables(backend, rank, world, [0]))
        children.append(context.Process(target=compute, args=(folder, backend)))
        children[-1].start()
    for child in children:
        child.join()
    return int(any(child.exitcode for child in children))


if __name__ == "__main__":
    if len(sys.argv) > 3:
        sys.exit(fork(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
    compute(Path(sys.argv[1]), sys.argv[2])
