"""The step benchmark: it runs on every backend, and its plain loop does what the engine does."""

import json
import subprocess

import numpy as np
import pytest

from triptych.core import config, parameters
from triptych.core.benchmarks import step as benchmark
from triptych.core.cli import main
from triptych.core.contracts import Hyper
from triptych.core.methods import METHODS

SMALL = (
    "model.name=resnet18",
    "model.image_size=32",
    "method.queue_size=64",
    "threads=1",
    "log.every=2",
)
RATIOS = ("speed_over_plain", "memory_over_plain", "loop_over_bare")


def in_this_process(name, part, arguments):
    """What a process of its own would measure, but for its peak memory."""
    spec = config.load(arguments.config, [*benchmark.DEFAULTS, *arguments.overrides])
    return benchmark._measure(spec, name, part, arguments.rounds)


@pytest.mark.one_backend
@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_queue_step_is_measured(backend, backend_name, processes, monkeypatch, capsys):
    if not processes:
        monkeypatch.setattr(benchmark, "_child", in_this_process)
    command = ["bench", "step", "-c", "moco_v2/resnet50", "--backend", backend_name]
    command += ["--rounds", "1", "--json"]
    assert main([*command, "-o", *SMALL]) == 0
    out = capsys.readouterr().out  # after what the measured loop has told
    (row,) = json.loads(out[out.rindex("[\n  {") :])
    assert row["backend"] == backend_name
    assert all(row[name] > 0 for name in (*RATIOS, "engine_seconds", "plain_seconds"))


@pytest.mark.parametrize(
    ("stderr", "said"), [("warning\nerror: threads: 0\n", "threads: 0"), ("", "status 7")]
)
def test_the_error_of_a_measurement_is_one_line(monkeypatch, capsys, stderr, said):
    failed = subprocess.CompletedProcess([], 7, "", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: failed)
    assert main(["bench", "step", "--backend", "torch"]) == 2
    assert capsys.readouterr().err == f"error: torch: the benchmark failed: {said}\n"


@pytest.mark.parametrize(
    "recipe", [pytest.param("moco_v1/resnet50", marks=pytest.mark.soak), "moco_v2/resnet50"]
)
def test_pytorchs_plain_loop_computes_what_the_engine_does(recipe):
    pytest.importorskip("torch")
    from triptych import backends
    from triptych.backends.torch.plain.moco import PlainLoop
    from triptych.core.formats import FORMATS

    spec = config.load(recipe, [*benchmark.DEFAULTS, *SMALL])
    state = parameters.initial_state(spec)
    engine = backends.load("torch").build(spec, state)
    official = FORMATS["moco"].from_canonical(state, spec)
    loop = PlainLoop(spec)
    for branch, module in (("encoder_q.", loop.query), ("encoder_k.", loop.key)):
        for name, tensor in module.state_dict().items():
            tensor.copy_(tensor.new_tensor(official[branch + name]))
    loop.queue.copy_(loop.queue.new_tensor(official["queue"]))
    for step in range(3):
        batch = benchmark.synthetic_batch(spec, step)
        hyper = Hyper(step, 0.01, 1e-4, 0.9)
        draws = METHODS[spec.method.name].draws(spec, step)
        loss = engine.read(engine.train_step(batch, draws, hyper))["loss"]
        assert loop.step(batch, hyper) == pytest.approx(loss, rel=1e-4), step
    queue = engine.export_state()["memory.queue"]
    np.testing.assert_allclose(queue, loop.queue.numpy(), atol=1e-3)
    assert not np.allclose(queue[:, :24], state["memory.queue"][:, :24], atol=0.1)
    np.testing.assert_array_equal(queue[:, 24:], state["memory.queue"][:, 24:])


MOCA = (
    "model.width=32",
    "model.depth=3",
    "model.heads=4",
    "model.image_size=96",
    "method.early_layer=1",
    "method.words=40",
    "method.decoder_width=24",
    "method.decoder_heads=3",
    "method.border=1",
    "threads=1",
    "log.every=2",
)


@pytest.mark.soak
def test_a_step_of_moca_is_measured_beside_moco_v3(capsys):
    pytest.importorskip("torch")
    command = ["bench", "step", "-c", "moca/vit_small", "--backend", "torch"]
    assert main([*command, "--rounds", "1", "-o", *MOCA]) == 0
    out = capsys.readouterr().out
    assert "counted: moca" in out and "measured: torch moca" in out


def test_mocas_plain_loop_computes_what_the_engine_does():
    pytest.importorskip("torch")
    from triptych import backends
    from triptych.backends.torch.plain.moca import PlainLoop

    spec = config.load("moca/vit_small", [*benchmark.DEFAULTS, *MOCA])
    state = parameters.initial_state(spec)
    engine = backends.load("torch").build(spec, state)
    loop = PlainLoop(spec)
    copy_moca(state, loop)
    for step in range(3):
        batch = benchmark.synthetic_batch(spec, step)
        draws = METHODS["moca"].draws(spec, step)
        loop.draw = lambda draws=draws: draws
        hyper = Hyper(step, 1e-3, 0.05, 0.9)
        loss = engine.read(engine.train_step(batch, draws, hyper))["loss"]
        assert loop.step(batch, hyper) == pytest.approx(loss, rel=1e-4), step
    found = engine.export_state()
    np.testing.assert_allclose(found["memory.words"], loop.words.numpy(), atol=1e-4)
    assert found["memory.distance"] == pytest.approx(float(loop.distance), rel=1e-5)


def copy_moca(state, loop):
    """The engine's initial weights, under the plain loop's names."""
    import torch

    modules = {
        "student.encoder.": loop.student,
        "teacher.encoder.": loop.teacher,
        "student.decoder.": loop.decoder,
        "student.image_predictor.": loop.image_weights,
        "student.dense_predictor.": loop.dense_weights,
    }
    places = {"hidden.0": "hidden", "hidden.1": "norm"}
    for prefix, module in modules.items():
        for name, tensor in module.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            own = "pos_embed" if name == "places" else name
            for mine, theirs in places.items():
                own = own.replace(mine, theirs) if name.startswith(mine + ".") else own
            value = torch.from_numpy(np.asarray(state[prefix + own]))
            tensor.copy_(value.reshape(tensor.shape))
    loop.words.copy_(torch.from_numpy(np.asarray(state["memory.words"])))


@pytest.mark.parametrize(
    "options",
    [
        ["-c", "moco_v3/resnet50_100ep"],
        ["-c", "moco_v2/resnet50", "-o", "model.width=8"],
        [
            "-c",
            "moco_v2/resnet50",
            "-o",
            "model.name=resnet",
            "model.block=bottleneck",
            "model.depths=[1,1,1,1]",
        ],
    ],
)
def test_what_has_no_plain_loop_is_refused(options, capsys):
    assert main(["bench", "step", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: bench step: there is no plain loop of moco_v")
