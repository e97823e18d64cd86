"""Loss curves of two processes of each framework along every axis, beside those of one."""

import numpy as np
import pytest
from support.divided import SPECS
from support.grids import alone, divided
from support.launched import together, trained
from support.native import tiny_spec

COUNT = 30
LARS = tiny_spec(optim={"name": "lars", "weight_decay": 0.01})
MOCA = tiny_spec(case="moca_vit", method={"decoder_heads": 4})
CASES = {
    "data: moco_v1": divided(SPECS["moco_v1 of virtual ranks"], data=2),
    "data: moco_v3": divided(LARS, data=2),
    "data: moca": divided(MOCA, data=2),
    "tensor: moco_v3": divided(LARS, tensor=2),
    "tensor: moca": divided(MOCA, tensor=2),
    "pipeline: moco_v3": divided(LARS, pipeline=2, micro_batches=4),
    "pipeline: moca": divided(MOCA, pipeline=2, micro_batches=4),
    "owned: moco_v3": divided(LARS, data=2, shard_optimizer=True),
    "owned: moca": divided(MOCA, data=2, shard_optimizer=True),
}


def curve(record: dict[str, np.ndarray]) -> np.ndarray:
    return np.array([record[f"loss/{step}"] for step in range(COUNT)])


@pytest.mark.parallel
@pytest.mark.timeout(1800)
def test_the_losses_of_thirty_steps_are_those_of_one_process(backend, backend_name, tmp_path):
    records = together(backend_name, 2, CASES, tmp_path, COUNT, limit=900)
    wholes: dict[str, np.ndarray] = {}
    errors = {}
    for name, spec in CASES.items():
        method = name.partition(": ")[2]
        if method not in wholes:
            wholes[method] = curve(trained(backend, alone(spec), COUNT))
            # A curve that stands still, or one that moves by itself, would prove nothing.
            assert np.ptp(wholes[method]) > 1e-3
        errors[name] = np.abs(curve(records[name][0]) / wholes[method] - 1).max()
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert {name: error for name, error in errors.items() if error > 1e-10} == {}
