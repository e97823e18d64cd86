"""The benchmark of several processes: bytes by the formula, and a run of it on PyTorch."""

import json

import numpy as np
import pytest
from conftest import under_test
from support.native import TINY

from triptych.core.benchmarks import traffic
from triptych.core.cli import main
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Group, Ranks


def spec_of(case="moco_v3_vit", **degrees):
    given = {"precision": "float32", "train": {"steps": 1, "batch_size": 8}, **TINY[case]}
    return RunSpec.model_validate({**given, "parallel": degrees})


class Four(Group):
    """One of four processes, each with the same tensors."""

    count = 4

    def sum(self, x):
        return 4 * x

    def gather(self, x):
        return np.concatenate([x] * 4)

    def sum_gradients(self, parameters):
        self.summed = list(parameters)

    def send(self, x, target):
        self.sent = target


def test_each_exchange_counts_what_a_ring_sends():
    ranks = Ranks()
    ranks.replicas, ranks.tensor = Four(), Four()
    sent = traffic.count(ranks)
    assert ranks.replicas.gather(np.zeros((2, 5), np.float32)).shape == (8, 5)
    assert sent == {"replicas": 3 * 40}
    ranks.replicas.sum_gradients(x for x in (np.zeros(4), np.zeros(2)))
    assert len(ranks.replicas.summed) == 2 and sent == {"replicas": 120 + 72}
    ranks.tensor.sum(np.zeros(6, np.float64))
    ranks.tensor.send(np.zeros(1, np.int64), 2)
    assert sent["tensor"] == 72 + 8 and ranks.tensor.sent == 2


def test_the_least_of_data_parallelism_is_gradients_and_keys():
    spec = spec_of("moco_v1_resnet18", data=2)
    whole = spec_of("moco_v1_resnet18")
    assert traffic.least(whole) == {}
    trained = traffic._trained(whole)
    image_and_key = 3 * 8 * 12 + 16
    assert traffic.least(spec) == {"replicas": 4 * (trained + 4 * image_and_key)}


def test_the_least_of_tensor_parallelism_is_two_sums_a_block():
    # 8 images of 7 tokens, width 32, 2 blocks; heads 32 -> 48 -> 48 -> 16 and 16 -> 48 -> 16.
    forward = 2 * (7 + 1) * 32
    backward = forward + 6 * 32
    heads = (48 + 32) + (16 + 16)
    numbers = 2 * 8 * (forward + backward + heads + forward + 48)
    assert traffic.least(spec_of(tensor=2)) == {"tensor": 4 * numbers}
    assert traffic._trained(spec_of(tensor=2)) < traffic._trained(spec_of())


def test_the_least_of_a_pipeline_is_the_tokens_of_each_forward_pass():
    tokens = 8 * 7 * 32
    assert traffic.least(spec_of(pipeline=2)) == {"pipeline": 4 * 2 * 2 * tokens}
    assert traffic.least(spec_of(pipeline=2, micro_batches=2)) == {"pipeline": 4 * 2 * 3 * tokens}


SMALL = ("model.width=32", "model.depth=2", "model.heads=4", "model.image_size=32")


@pytest.mark.parallel
def test_two_processes_are_measured_beside_one(capsys):
    if "torch" not in under_test():
        pytest.skip("torch is not under test")
    command = ["bench", "parallel", "--backend", "torch", "--rounds", "1", "--json"]
    command += ["--repeats", "2"]
    command += ["--layouts", "tensor=2", "-o", *SMALL, "method.hidden_dim=64"]
    assert main(command) == 0
    one, two = json.loads(capsys.readouterr().out)
    assert (one["processes"], two["processes"], one["sent"]) == (1, 2, {})
    assert two["sent"]["tensor"] == pytest.approx(two["least"]["tensor"], rel=0.1)
    assert two["speed"] == pytest.approx(one["seconds"] / two["seconds"])


def test_a_layout_that_cannot_be_is_named(capsys):
    command = ["bench", "parallel", "--backend", "torch", "--layouts", "tensor=5"]
    assert main([*command, "-o", *SMALL]) == 2
    assert "model.heads 4 is not divisible by 5" in capsys.readouterr().err
    assert main([*command, "--repeats", "0"]) == 2
    assert "--repeats 0: expected at least 1" in capsys.readouterr().err
