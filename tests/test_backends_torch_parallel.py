"""PyTorch in several processes: losses, gradients and states are those of one process."""

import socket

import numpy as np
import pytest
from conftest import under_test
from support.divided import METHODS, SPECS, differences, spec_of
from support.grids import DATA, FOUR, RESNETS, alone, divided
from support.launched import together, trained
from support.native import tiny_spec

from triptych import backends
from triptych.core.errors import UserError

COUNT = 3
"""Steps of a case: the second one sees what the first has changed, the third the moments."""


TENSOR = {
    "linear": SPECS["linear"],
    "finetune": spec_of(METHODS["finetune"], optim={"name": "adamw", "clip_norm": 0.1}),
    "moco_v3": tiny_spec(optim={"name": "lars", "weight_decay": 0.01}),
    "moca": tiny_spec(case="moca_vit", method={"decoder_heads": 4}),
}
OWNED = {
    "linear": SPECS["linear"],
    "moco_v1": SPECS["moco_v1"],
    "moco_v3": TENSOR["moco_v3"],
    "moca": SPECS["moca"],
}
STAGES = {
    "linear": SPECS["linear"],
    "finetune": TENSOR["finetune"],
    "moco_v3": TENSOR["moco_v3"],
    "moca": SPECS["moca"],
}
CASES = {
    **{f"data: {name}": divided(spec, data=2) for name, spec in DATA.items()},
    **{f"tensor: {name}": divided(spec, tensor=2) for name, spec in TENSOR.items()},
    **{f"pipeline: {name}": divided(spec, pipeline=2) for name, spec in STAGES.items()},
    **{f"4 parts: {n}": divided(s, pipeline=2, micro_batches=4) for n, s in STAGES.items()},
    **{f"owned: {n}": divided(spec, data=2, shard_optimizer=True) for n, spec in OWNED.items()},
}


@pytest.fixture(scope="module")
def package():
    if "torch" not in under_test():
        pytest.skip("torch is not under test")
    return backends.load("torch")


@pytest.fixture(scope="module")
def records(package, tmp_path_factory):
    return together("torch", 2, CASES, tmp_path_factory.mktemp("two"), COUNT)


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
    found = together("torch", 4, names, tmp_path, 5, limit=3000)
    wholes: dict[str, dict] = {}
    problems = []
    for name, spec in names.items():
        whole = wholes.setdefault(name.partition(",")[0], trained(package, alone(spec), 5))
        problems += [(name, each) for each in differences(found[name][0], whole)]
    assert problems == []


def test_a_port_in_use_is_named(package, monkeypatch):
    from triptych.backends.torch import parallel

    monkeypatch.setattr(parallel, "follow_launcher", lambda: None)
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in {**given, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"^MASTER_PORT={port}: .*address already in use.*give"):
            parallel.Processes(tiny_spec())
