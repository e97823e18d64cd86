"""PyTorch in several processes: losses, gradients and states are those of one process."""

import pytest
from conftest import requested
from support.native import differences, steps, tiny_spec
from support.processes import together
from test_backends_accumulate import METHODS, spec_of

from triptych import backends
from triptych.core.config.spec import ParallelSpec, RunSpec

COUNT = 3
"""Steps of a case: the second one sees what the first has changed, the third the moments."""


def divided(spec: RunSpec, **degrees) -> RunSpec:
    """The spec for several processes, checked anew."""
    return RunSpec.model_validate({**spec.model_dump(mode="json"), "parallel": degrees})


def alone(spec: RunSpec) -> RunSpec:
    return spec.model_copy(update={"parallel": ParallelSpec()})


MOCA = tiny_spec(case="moca_vit", method={"decoder_heads": 4})
TENSOR = {
    "tensor linear": spec_of(METHODS["linear"]),
    "tensor finetune": spec_of(METHODS["finetune"], optim={"name": "adamw", "clip_norm": 0.1}),
    "tensor moco_v3": tiny_spec(optim={"name": "lars", "weight_decay": 0.01}),
    "tensor moca": MOCA,
}
CASES = {name: divided(spec, tensor=2) for name, spec in TENSOR.items()}


@pytest.fixture(scope="module")
def package():
    if "torch" not in (backends.installed() if requested() is None else requested()):
        pytest.skip("torch is not under test")
    return backends.load("torch")


@pytest.fixture(scope="module")
def records(package, tmp_path_factory):
    return together("torch", 2, CASES, tmp_path_factory.mktemp("two"), COUNT)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does(package, records, name):
    whole = steps(package, alone(CASES[name]), COUNT)
    for record in records[name]:
        assert differences(record, whole) == []
