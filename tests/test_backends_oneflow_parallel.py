"""OneFlow in several processes: losses, gradients and states are those of one process."""

import numpy as np
import pytest
from conftest import under_test
from support.divided import METHODS, SPECS, differences, spec_of
from support.grids import FOUR, RESNETS, alone, divided
from support.launched import together, trained
from support.native import draws, hyper, lively_state, random_batch, tiny_spec
from support.oneflow_ranks import WORKER, finish, launch
from support.oneflow_worker import normalized

from triptych import backends
from triptych.core.contracts import Group

COUNT = 2
"""Steps of a case: the second one sees what the first has changed."""


CASES = {
    "data: finetune": divided(SPECS["finetune"], data=2),
    "data: moco_v1": divided(tiny_spec(case="moco_v1_resnet18"), data=2),
    "data: moco_v3": divided(tiny_spec(), data=2),
    "owned: linear": divided(SPECS["linear"], data=2, shard_optimizer=True),
    "owned: moco_v3": divided(
        tiny_spec(optim={"name": "lars", "weight_decay": 0.01}), data=2, shard_optimizer=True
    ),
    "owned: moca": divided(SPECS["moca"], data=2, shard_optimizer=True),
    "tensor: linear": divided(SPECS["linear"], tensor=2),
    "tensor: finetune": divided(
        spec_of(METHODS["finetune"], optim={"name": "adamw", "clip_norm": 0.1}), tensor=2
    ),
    "tensor: moco_v3": divided(tiny_spec(optim={"name": "lars", "weight_decay": 0.01}), tensor=2),
    "pipeline: linear": divided(SPECS["linear"], pipeline=2),
    "pipeline: finetune": divided(
        spec_of(METHODS["finetune"], optim={"name": "adamw", "clip_norm": 0.1}),
        pipeline=2,
        micro_batches=2,
    ),
    "pipeline: moco_v3": divided(
        tiny_spec(optim={"name": "lars", "weight_decay": 0.01}), pipeline=2, micro_batches=2
    ),
    "pipeline: moca": divided(SPECS["moca"], pipeline=2, micro_batches=2),
    "tensor: moca": divided(tiny_spec(case="moca_vit", method={"decoder_heads": 4}), tensor=2),
}


@pytest.fixture(scope="module")
def package():
    if "oneflow" not in under_test():
        pytest.skip("oneflow is not under test")
    return backends.load("oneflow")


@pytest.fixture(scope="module")
def records(package, tmp_path_factory):
    return together("oneflow", 2, CASES, tmp_path_factory.mktemp("two"), COUNT)


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
    found = together("oneflow", 4, names, tmp_path, 5, limit=3000)
    wholes: dict[str, dict] = {}
    problems = []
    for name, spec in names.items():
        whole = wholes.setdefault(name.partition(",")[0], trained(package, alone(spec), 5))
        problems += [(name, each) for each in differences(found[name][0], whole)]
    assert problems == []


# ------------------------------------------------------------------------- exchanges, and their end


@pytest.fixture(scope="module")
def pair(package, tmp_path_factory):
    """What two processes have found, and the launcher's status and errors: one was killed then."""
    folder = tmp_path_factory.mktemp("pair")
    status, _, err = finish(launch(2, WORKER, folder, "groups", "batch_norm"))
    return [dict(np.load(folder / f"{rank}.npz")) for rank in (0, 1)], status, err


def own(rank):
    return np.arange(4, 8).reshape(2, 2) + 10 * rank


@pytest.mark.parametrize("axis", ["replicas", "norms", "tensor", "pipeline"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_groups_exchange_tensors_of_every_type(pair, axis, dtype):
    for rank, found in enumerate(pair[0]):
        members = [0, 1] if axis in ("replicas", "norms") else [rank]
        parts, key = [own(member) for member in members], f"groups.{axis}.oneflow.{dtype}"
        assert np.array_equal(found[f"{key}.sum"], sum(parts))
        assert np.array_equal(found[f"{key}.gather"], np.concatenate(parts))
        assert np.array_equal(found[f"{key}.broadcast"], parts[0])
        assert found[f"groups.{axis}.scalar"] == members[0]
        assert list(found["groups.largest"]) == [7, 1]


@pytest.mark.parametrize("shape", [(8, 6), (8, 6, 3, 5)])
def test_batch_norm_of_unequal_parts_is_that_of_the_whole_batch(pair, shape):
    wanted = normalized(shape, slice(None), Group())
    for rank, found in enumerate(pair[0]):
        for name, array in wanted.items():
            rows = (slice(0, 5), slice(5, 8))[rank] if name in ("y", "grad") else ()
            got = found[f"batch_norm.{len(shape)}.{name}"]
            np.testing.assert_allclose(got, array[rows], rtol=0, atol=1e-12, err_msg=name)


def test_a_killed_process_ends_the_others_with_one_line(pair):
    _, status, err = pair
    assert status == 1
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    remedy = "start the command again, a training with --resume auto"
    assert errors == [f"error: process 1 of 2 has ended; {remedy}"]


# ----------------------------------------------------------------------- activations computed again


def test_activations_that_are_computed_again_are_the_same(package):
    """Equal to the last bit, with fewer values kept for the backward pass."""
    import oneflow as flow

    results, kept = [], []
    for recompute in (False, True):
        spec = tiny_spec(case="moca_vit", parallel={"recompute": recompute})
        engine, sizes = package.build(spec, lively_state(spec)), []

        def pack(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        inputs = random_batch(spec), draws(spec), hyper()
        with flow.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            engine.loss_and_grads(*inputs)
        results.append(engine.trace_step(*inputs))
        kept.append(sum(sizes))
    for want, got in zip(*results, strict=True):
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)
    assert kept[1] < 0.6 * kept[0]
