"""Paddle in several processes: losses, gradients and states are those of one process."""

import numpy as np
import pytest
from support.divided import METHODS, SPECS, differences, spec_of
from support.launched import together, trained
from support.native import tiny_spec
from support.paddle_engines import framework

from triptych import backends
from triptych.core.config.spec import ParallelSpec, RunSpec

COUNT = 3
"""Steps of a case: the second one sees what the first has changed, the third the moments."""


def divided(spec: RunSpec, **degrees) -> RunSpec:
    """The spec for several processes, checked anew."""
    return RunSpec.model_validate({**spec.model_dump(mode="json"), "parallel": degrees})


LARS = {"name": "lars", "weight_decay": 0.01, "clip_norm": 0.5}
CASES = {
    "linear": divided(SPECS["linear"], data=2),
    "finetune": divided(SPECS["finetune"], data=2),
    "moco_v1 of virtual ranks": divided(SPECS["moco_v1 of virtual ranks"], data=2),
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
    alone = CASES[name].model_copy(update={"parallel": ParallelSpec()})
    assert differences(first, trained(package, alone, COUNT)) == []
    # The running statistics of the run are those of the first copy.
    same = {name: array for name, array in second.items() if "running" not in name}
    assert all(np.array_equal(array, first[name]) for name, array in same.items())
