"""How a batch reaches a device with memory of its own, seen where there is none."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
from support.ferry import Ferry
from support.native import draws, hyper, lively_state, random_batch, tiny_spec

from triptych.core import reference
from triptych.core.data.pixels import normalize
from triptych.core.reference import ops as reference_ops

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def levels(channels=3):
    rows = (np.broadcast_to(np.float32(row), channels) for row in (255, MEAN, DEVIATION))
    return np.stack(list(rows)).reshape(3, channels, 1, 1)


def both_forms(spec):
    """A batch as normalised numbers, and the same batch as bytes."""
    batch = random_batch(spec)
    pixels = tuple((view * 64 + 128).clip(0, 255).astype(np.uint8) for view in batch.views)
    numbers = tuple(normalize(view, MEAN, DEVIATION) for view in pixels)
    return replace(batch, views=numbers), replace(batch, views=pixels, levels=levels())


def same(got, want):
    for found, wanted in zip(got, want, strict=True):
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_bytes_become_the_numbers_of_the_host(backend, precision):
    """Every level of every channel, bit for bit."""
    spec = tiny_spec(precision)
    pixels = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (2, 3, 1, 1))
    want = normalize(pixels, MEAN, DEVIATION).astype(precision)
    for package, ops in ((backend, backend.ops), (reference, reference_ops)):
        engine = package.build(spec, lively_state(spec))
        got = engine.array(ops.normalized(engine.tensor(pixels), engine.tensor(levels())))
        np.testing.assert_array_equal(got.astype(precision), want)
        assert len(np.unique(got)) == 3 * 256


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("case", ["moco_v3_vit", "moco_v1_resnet18", "moca_vit"])
def test_a_step_on_carried_bytes_is_the_same(backend, case, accumulate):
    """Bit for bit, with each index as a tensor of the device."""
    spec = tiny_spec(case=case, train={"accumulate": accumulate})
    records = []
    for batch, carried in zip(both_forms(spec), (False, True), strict=True):
        engine = backend.build(spec, lively_state(spec))
        engine.courier = Ferry(engine) if carried else None
        records.append(engine.trace_step(batch, draws(spec), hyper()))
    same(records[1], records[0])


def test_a_metric_is_brought_by_the_courier(backend):
    spec = tiny_spec()
    engine = backend.build(spec, lively_state(spec))
    metrics = engine.train_step(random_batch(spec), draws(spec), hyper(), monitor=True)
    want, engine.courier = engine.read(metrics), Ferry(engine)
    assert engine.fetch(metrics)() == want


# ---------------------------------------------------------------------- the streams of a GPU


class Streams:
    """Stands in for ``torch.cuda`` and ``paddle.device``: keeps who waits for what."""

    def __init__(self):
        self.log, self.count, outer = [], 0, self

        class Event:
            def __init__(self):
                self.state = 0  # how often it was recorded

            def record(self, stream):
                self.state += 1
                outer.log.append(("record", stream.name, self, self.state))

            def synchronize(self):
                outer.log.append(("host waits", None, self, self.state))

        class Stream:
            def __init__(self, device=None):
                outer.count += 1
                self.name = f"copy {outer.count}"

            def wait_event(self, event):
                outer.log.append(("wait", self.name, event, event.state))

        self.Event, self.Stream, self.computing = Event, Stream, Stream()
        self.computing.name = "compute"

    def stream(self, stream):
        return nullcontext()

    stream_guard = stream

    def current_stream(self, device):
        return self.computing

    def waits(self, kind, name=None):
        """The (event, state) pairs that a stream, or the host, has waited for."""
        return [(event, state) for k, n, event, state in self.log if (k, n) == (kind, name)]


@pytest.fixture
def courier(backend, backend_name, monkeypatch):
    """A courier of a backend whose GPU is the host. OneFlow has no streams."""
    streams = Streams()
    if backend_name == "torch":
        import torch

        for name in ("Stream", "Event", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    elif backend_name == "paddle":
        import paddle

        for name in ("Stream", "Event", "stream_guard", "current_stream"):
            monkeypatch.setattr(paddle.device, name, getattr(streams, name))
        monkeypatch.setattr(paddle, "CUDAPinnedPlace", paddle.CPUPlace)
        monkeypatch.setattr(paddle.Tensor, "cuda", lambda x, device, blocking: x.clone())
    engine = backend.build(tiny_spec("float32"), lively_state(tiny_spec("float32")))
    module = __import__(f"{backend.__name__}.courier", fromlist=["Courier"])
    return engine, module.Courier("cpu", engine.dtype), streams


def cargo(seed):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, 256, (3, 2, 5, 7), np.uint8),
        rng.integers(0, 99, (4, 6))[:, :3],  # not in one piece
        rng.random(5),
        np.array(rng.random()),
    ]


def test_a_batch_arrives_as_it_was_and_stays_for_one_more(courier):
    engine, courier, _ = courier
    sent, arrived = [], []
    for step in range(4):
        sent.append(cargo(step))
        arrived.append(courier.carry(sent[-1]))
        for arrays, tensors in list(zip(sent, arrived, strict=True))[-2:]:
            for array, tensor in zip(arrays, tensors, strict=True):
                wide = np.float32 if array.dtype == np.float64 else array.dtype
                found = engine.array(tensor)
                assert found.dtype == wide
                np.testing.assert_array_equal(found, array.astype(wide))


def test_the_device_waits_for_its_batch_and_the_copy_for_its_place(courier, backend_name):
    if backend_name == "oneflow":
        pytest.skip("OneFlow orders its copies itself")
    _, courier, streams = courier
    for step in range(5):
        streams.log.clear()
        courier.carry(cargo(step))
        recorded = {kind_name[1] for kind_name in streams.log if kind_name[0] == "record"}
        (arrived,) = streams.waits("wait", "compute")
        # The computation waits for the copy of this very batch.
        copy = next(n for k, n, e, s in streams.log if k == "record" and (e, s) == arrived)
        assert copy.startswith("copy")
        if step >= 2:
            # Neither memory is written before the batch before the last one is done with it.
            assert "compute" in recorded
            used = streams.waits("host waits") + streams.waits("wait", copy)
            newest = streams.waits("record", "compute")
            assert used and not set(newest) & set(used)


def test_a_metric_comes_back_beside_the_computation(courier, backend_name):
    engine, courier, streams = courier
    tensors = {"loss": engine.tensor(np.array(3.5)), "q": engine.tensor(np.eye(3))}
    wait = courier.bring(tensors)
    assert not streams.waits("host waits")
    found = wait()
    assert {name: engine.array(x).tolist() for name, x in found.items()} == {
        "loss": 3.5,
        "q": np.eye(3).tolist(),
    }
    if backend_name != "oneflow":
        (computed,), (arrived,) = streams.waits("record", "compute"), streams.waits("host waits")
        copy = next(n for k, n, e, s in streams.log if k == "record" and (e, s) == arrived)
        assert streams.waits("wait", copy) == [computed]
        assert not streams.waits("wait", "compute")
