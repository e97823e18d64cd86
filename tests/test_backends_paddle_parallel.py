"""Paddle in several processes: losses, gradients and states are those of one process."""

import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from support.divided import METHODS, SPECS, differences, spec_of
from support.grids import DATA, FOUR, RESNETS, alone, divided
from support.launched import start, together, trained
from support.native import tiny_spec
from support.paddle_engines import framework

from triptych import backends
from triptych.core.errors import UserError

COUNT = 3
"""Steps of a case: the second one sees what the first has changed, the third the moments."""


LARS = {"name": "lars", "weight_decay": 0.01, "clip_norm": 0.5}
CASES = {
    "linear": divided(SPECS["linear"], data=2),
    "finetune": divided(SPECS["finetune"], data=2),
    "moco_v1 of virtual ranks": divided(SPECS["moco_v1 of virtual ranks"], data=2),
    "moco_v2": divided(DATA["moco_v2"], data=2),
    "moco_v3 of a ResNet": divided(tiny_spec(case="moco_v3_resnet18"), data=2),
    "moco_v3": divided(SPECS["moco_v3"], data=2, recompute=True),
    "moca": divided(SPECS["moca"], data=2, shard_optimizer=True),
    "tensor: linear": divided(SPECS["linear"], tensor=2),
    "tensor: finetune": divided(spec_of(METHODS["finetune"]), tensor=2),
    "tensor: moco_v3": divided(tiny_spec(optim=LARS), tensor=2),
    "tensor: moca": divided(tiny_spec(case="moca_vit", method={"decoder_heads": 4}), tensor=2),
    "pipeline: linear": divided(SPECS["linear"], pipeline=2),
    "pipeline: finetune": divided(SPECS["finetune"], pipeline=2, recompute=True),
    "pipeline: moco_v3": divided(tiny_spec(optim=LARS), pipeline=2, micro_batches=4),
    "pipeline: moca": divided(SPECS["moca"], pipeline=2, micro_batches=4),
}


@pytest.fixture(scope="module", autouse=True)
def package():
    framework()
    return backends.load("paddle")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return together("paddle", 2, CASES, tmp_path_factory.mktemp("two"), COUNT)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(package, records, name):
    first, second = records[name]
    assert differences(first, trained(package, alone(CASES[name]), COUNT)) == []
    # The running statistics of the run are those of the first copy.
    same = {name: array for name, array in second.items() if "running" not in name}
    assert all(np.array_equal(array, first[name]) for name, array in same.items())


@pytest.mark.parallel
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("names", [FOUR, RESNETS], ids=["vit", "resnet"])
def test_four_processes_compute_what_one_does(package, tmp_path, names):
    """Five steps of every grid of processes."""
    found = together("paddle", 4, names, tmp_path, 5, limit=3000)
    wholes: dict[str, dict] = {}
    problems = []
    for name, spec in names.items():
        whole = wholes.setdefault(name.partition(",")[0], trained(package, alone(spec), 5))
        problems += [(name, each) for each in differences(found[name][0], whole)]
    assert problems == []


def test_a_port_in_use_is_named(monkeypatch):
    from triptych.backends.paddle.link import Link

    monkeypatch.setenv("PADDLE_TRAINER_ID", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("PADDLE_MASTER", f"127.0.0.1:{port}")
        with pytest.raises(UserError, match=f"port {port}: Address already in use .*; free it"):
            Link()


LATE = """
import time
from support.divided import SPECS
from triptych.core import launch
from triptych.core.config.spec import ParallelSpec
spec = SPECS["moco_v3"].model_copy(update={"parallel": ParallelSpec(data=2)})
ranks = launch.join(spec, "paddle")
time.sleep(35 * ranks.rank)
print(ranks.largest(7 - ranks.rank))
ranks.close()
"""


@pytest.mark.parallel
def test_a_process_that_is_later_than_gloo_waits_is_waited_for():
    processes = start([sys.executable, "-c", LATE], "paddle", 2, stdout=subprocess.PIPE)
    assert [process.communicate(timeout=120)[0] for process in processes] == ["7\n", "7\n"]


@pytest.mark.parallel
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_one_line(tmp_path, victim):
    options = ["-c", "moco_v3/digits", "--backend", "paddle", "--output", str(tmp_path)]
    changes = ["parallel.data=2", "threads=1", "log.every=1", "evaluate.every=0"]
    command = [sys.executable, "-m", "triptych.core.cli", "train", *options, "-o", *changes]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = start(command, "paddle", 2, **pipes)
    try:
        # A fast machine leaves steps out of what it prints.
        next(line for line in processes[0].stdout if re.match(r"step (?!1/)\d+/", line))
        processes[victim].send_signal(signal.SIGKILL)
        _, told = processes[1 - victim].communicate(timeout=30)
        assert processes[1 - victim].returncode == 1
        remedy = "start the command again, a training with --resume auto"
        assert told.splitlines() == [f"error: process {victim} of 2 has ended; {remedy}"]
    finally:
        for process in processes:
            process.kill()
