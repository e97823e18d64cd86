"""A transformer block as one operation in NumPy, and NumPy's loops in threads."""

import numpy as np
import pytest
from conftest import under_test
from support.native import draws, hyper, lively_state, random_batch, tiny_spec

from triptych import backends

pytestmark = pytest.mark.skipif("oneflow" not in under_test(), reason="oneflow is not under test")


@pytest.fixture
def package(monkeypatch):
    """The backend, as on a processor with AVX-512."""
    package = backends.load("oneflow")
    monkeypatch.setattr(package.products, "serve", lambda: True)
    yield package
    package.threads.set_count(1)


def build(package, case="moco_v3_vit", threads=1, **sections):
    spec = tiny_spec("float32", case, **sections).model_copy(update={"threads": threads})
    return package.build(spec, lively_state(spec))


def steps(engine, count=2):
    """What some steps compute, and the state after them."""
    spec, found = engine.spec, {}
    for i in range(count):
        values, gradients = engine.trace_step(random_batch(spec, i), draws(spec, i), hyper(i))
        found.update({f"{i}/{name}": x for name, x in {**values, **gradients}.items()})
    return {**found, **engine.export_state()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not np.array_equal(first[name], second[name])] == []


def test_a_block_is_that_of_its_layers(package, monkeypatch):
    """To the last bit: the operations and their order are the same."""
    from triptych.backends.oneflow import fused, vit

    results, calls, whole = [], [], fused.block
    for fuse in (True, False):
        engine = build(package)

        def block(module, x, *, recompute, fuse=fuse):
            calls.append(fuse)
            return whole(module, x, recompute=recompute) if fuse else module._added(x)

        monkeypatch.setattr(vit.fused, "block", block)
        results.append(steps(engine))
    assert calls.count(True) == calls.count(False) > 0
    assert_same(*results)


def test_a_block_differentiates_what_is_trained(package):
    import oneflow as flow

    engine = build(package)
    block = engine.model.student.encoder.blocks[0]
    tokens = np.random.default_rng(1).standard_normal((2, 5, block.norm1.weight.shape[0]))
    gradients = []
    for of_x, of_weights in ((True, True), (True, False), (False, True)):
        block.requires_grad_(of_weights)
        engine.clear_gradients()
        x = flow.tensor(tokens.astype(np.float32)).requires_grad_(of_x)
        block(x).sum().backward()
        own = [parameter.grad.numpy().copy() for parameter in block.parameters()]
        gradients.append((x.grad.numpy().copy() if of_x else None, own))
    block.requires_grad_(True)
    (x, own), (x_alone, none), (nothing, own_alone) = gradients
    assert np.abs(x).max() > 0 and np.array_equal(x, x_alone) and nothing is None
    assert all(
        np.array_equal(a, b) and np.abs(a).max() > 0 for a, b in zip(own, own_alone, strict=True)
    )
    assert not any(gradient.any() for gradient in none)
    with flow.no_grad():
        y = block(flow.tensor(tokens.astype(np.float32)))
    assert not y.requires_grad


def test_a_block_frees_its_activations_while_the_loss_lives(package, monkeypatch):
    import oneflow as flow

    from triptych.backends.oneflow import fused

    kept, whole = [], fused._recorded_block

    def recorded(x, layers):
        y, backward = whole(x, layers)
        kept.append(backward)
        return y, lambda grad: backward(grad)

    monkeypatch.setattr(fused, "_recorded_block", recorded)
    block = build(package).model.student.encoder.blocks[0]
    x = flow.ones(2, 5, block.norm1.weight.shape[0]).requires_grad_()
    loss = block(x).sum()
    (backward,) = kept
    cells = [cell.cell_contents for cell in backward.__closure__]
    (held,) = [value for value in cells if isinstance(value, list)]
    assert len(held) == 2
    loss.backward()
    assert held == []


@pytest.mark.parametrize("optim", [{}, {"name": "sgd"}])
def test_a_block_sees_the_weights_that_were_written_last(package, optim):
    """By the optimizer, and by a load while OneFlow is busy."""
    import oneflow as flow

    engine = build(package, optim=optim)
    block = engine.model.student.encoder.blocks[1]
    weight = block.mlp.fc1.weight
    x = flow.from_numpy(np.ones((1, 3, block.norm1.weight.shape[0]), np.float32))
    with flow.no_grad():
        before = block(x).numpy()
        start = weight.numpy().copy()
        slow = flow.ones(1000, 1000)
        for _ in range(5):
            slow = flow.matmul(slow, slow) * 1e-3
        weight.copy_(weight * 2.0 + 0.0 * slow[0, 0])
        twice = block(x).numpy()
        weight.copy_(flow.from_numpy(start))
        assert np.array_equal(block(x).numpy(), before) and not np.array_equal(twice, before)
    engine.train_step(random_batch(engine.spec), {}, hyper())
    with flow.no_grad():
        moved = block(x).numpy()
        assert np.array_equal(moved, block._added(x).numpy())
    assert not np.array_equal(moved, before)


def test_parameters_out_of_a_buffer_are_read_too(package):
    from oneflow import nn

    from triptych.backends.oneflow import flat

    module = build(package).model.student.encoder.blocks[0].mlp.fc1
    (packed,) = flat.arrays([module])
    assert np.shares_memory(packed["weight"], module.weight.numpy())
    module.weight = nn.Parameter(module.weight.detach().clone() + 1.0)
    (found,) = flat.arrays([module])
    assert np.array_equal(found["weight"], module.weight.numpy())
    assert not np.shares_memory(found["weight"], packed["weight"])
    assert np.array_equal(found["bias"], module.bias.numpy())


def test_adamw_is_that_of_oneflow_s_operations(package, monkeypatch):
    from triptych.backends.oneflow.optim import AdamW

    found = []
    for numpy_serves in (True, False):
        monkeypatch.setattr(AdamW, "numpy_serves", numpy_serves)
        engine = build(package)
        (state, optimizer) = (steps(engine, 1), engine.optimizer)
        assert optimizer._waits == numpy_serves
        found.append(state)
    for name, array in found[0].items():
        if "exp_avg" in name:
            assert np.array_equal(array, found[1][name]), name
        # The last operation divides before it multiplies, or after.
        np.testing.assert_allclose(array, found[1][name], rtol=3e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("case", ["moco_v3_vit", "moca_vit"])
def test_threads_make_no_difference(package, monkeypatch, case):
    from triptych.backends.oneflow import kernels, threads

    monkeypatch.setattr(kernels, "BLOCK", 64)
    runs, pool = [], threads.ThreadPoolExecutor

    class Counted(pool):
        def submit(self, *arguments):
            runs.append(count)
            return super().submit(*arguments)

    monkeypatch.setattr(threads, "ThreadPoolExecutor", Counted)
    results = []
    for count in (1, 2, 3):
        engine = build(package, case, threads=count)
        results.append(steps(engine, 1))
    assert set(runs) == {2, 3}
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_a_failure_in_a_thread_is_that_of_the_call(package):
    package.threads.set_count(2)

    def work(part):
        if part.start == 2:
            raise ValueError("block 2")

    with pytest.raises(ValueError, match="block 2"):
        package.threads.each(work, 4, 1)
    done = []
    package.threads.each(done.append, 5, 2)
    assert sorted(part.start for part in done) == [0, 2, 4]


def test_a_thread_gives_no_warning(package, recwarn):
    package.threads.set_count(2)
    x = np.full(4, 1e38, np.float32)
    package.threads.each(lambda part: x[part].__imul__(x[part]), 4, 1)
    assert np.isinf(x).all() and not recwarn.list


@pytest.mark.parametrize("case", ["moco_v3_vit", "moca_vit"])
def test_a_block_is_computed_again_in_the_backward_pass(package, monkeypatch, case):
    """To the last bit. Nothing but its input is kept meanwhile."""
    from triptych.backends.oneflow import fused

    whole, results, calls = fused._recorded_block, [], []

    def recorded(x, layers):
        calls[-1] += 1
        return whole(x, layers)

    monkeypatch.setattr(fused, "_recorded_block", recorded)
    for recompute in (False, True):
        calls.append(0)
        engine = build(package, case, parallel={"recompute": recompute})
        results.append(steps(engine, 1))
    student = engine.model.student
    others = 2 * len(student.decoder.blocks) if case == "moca_vit" else 0  # of both views
    assert calls[1] - calls[0] == calls[0] - others > 0
    assert_same(*results)


def test_an_update_of_a_part_of_the_buffer(package):
    """As where several copies of the model share the optimizer's state."""
    import oneflow as flow

    buffer = flow.arange(20).to(flow.float32)
    array = buffer[3:][2:9].numpy()
    array *= 0.0
    assert buffer.numpy().tolist() == [*range(5), *[0] * 7, *range(12, 20)]
