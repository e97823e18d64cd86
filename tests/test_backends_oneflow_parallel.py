"""Several processes on OneFlow: exchanges along each axis, and batch norm over all of them."""

import numpy as np
import pytest
from support.native import draws, hyper, lively_state, random_batch, tiny_spec
from support.oneflow_ranks import WORKER, finish, launch, results

flow = pytest.importorskip("oneflow")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What two processes in data parallel have found."""
    return results(tmp_path_factory.mktemp("pair"), 2, ("groups", "batch_norm"))


def own(rank):
    return np.arange(4, 8).reshape(2, 2) + 10 * rank


@pytest.mark.parametrize("axis", ["replicas", "norms", "tensor", "pipeline"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_groups_exchange_tensors_of_every_type(pair, axis, dtype):
    for rank, found in enumerate(pair):
        members = [0, 1] if axis in ("replicas", "norms") else [rank]
        parts, key = [own(member) for member in members], f"groups.{axis}.oneflow.{dtype}"
        assert np.array_equal(found[f"{key}.sum"], sum(parts))
        assert np.array_equal(found[f"{key}.gather"], np.concatenate(parts))
        assert np.array_equal(found[f"{key}.broadcast"], parts[0])
        assert found[f"groups.{axis}.scalar"] == members[0]
        assert list(found["groups.largest"]) == [7, 1]


@pytest.mark.parametrize("axes", [2, 4])
def test_batch_norm_of_unequal_parts_is_that_of_the_whole_batch(pair, axes):
    from triptych.backends.oneflow import layers

    rng = np.random.default_rng(5)
    for shape in ((8, 6), (8, 6, 3, 5))[: axes // 2]:
        x, probe = rng.standard_normal((2, *shape)) + 3.0
    layer = layers.BatchNorm(6).to(flow.float64)
    leaf = flow.tensor(x).requires_grad_(True)
    y = layer(leaf)
    (y * flow.tensor(probe)).sum().backward()
    key = f"batch_norm.{axes}"
    for name, whole in (("y", y.detach()), ("grad", leaf.grad)):
        parts = np.concatenate([found[f"{key}.{name}"] for found in pair])
        np.testing.assert_allclose(parts, whole.numpy(), rtol=0, atol=1e-12)
    wanted = {name: parameter.grad for name, parameter in layer.named_parameters()}
    wanted.update(layer.named_buffers())
    for found in pair:
        for name, tensor in wanted.items():
            np.testing.assert_allclose(found[f"{key}.{name}"], tensor.numpy(), rtol=0, atol=1e-12)


def test_a_killed_process_ends_the_others_with_one_line(tmp_path):
    status, _, err = finish(launch(2, WORKER, tmp_path, "killed"), within=60)
    assert status == 1
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert errors == ["error: process 1 of 2 has ended; go on with --resume auto"]


def test_activations_that_are_computed_again_are_the_same():
    """Equal to the last bit, with fewer values kept for the backward pass."""
    from triptych.backends import oneflow as package

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
