"""The step benchmark: it runs on every backend, and its plain loop does what the engine does."""

import json

import numpy as np
import pytest

from triptych.core import config, parameters
from triptych.core.algorithms import METHODS
from triptych.core.benchmarks import step as benchmark
from triptych.core.cli import main
from triptych.core.engine import Hyper

SMALL = (
    "model.name=resnet18",
    "model.image_size=32",
    "method.queue_size=64",
    "threads=1",
    "log.every=2",
)
RATIOS = ("speed_over_plain", "memory_over_plain", "loop_over_bare")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["moco_v1/resnet50", "moco_v2/resnet50"])
def test_a_queue_step_is_measured(backend, backend_name, recipe, capsys):
    command = ["bench", "step", "-c", recipe, "--backend", backend_name, "--rounds", "1", "--json"]
    assert main([*command, "-o", *SMALL]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["backend"] == backend_name
    assert all(row[name] > 0 for name in (*RATIOS, "engine_seconds", "plain_seconds"))


@pytest.mark.parametrize("recipe", ["moco_v1/resnet50", "moco_v2/resnet50"])
def test_pytorchs_plain_loop_computes_what_the_engine_does(recipe):
    pytest.importorskip("torch")
    from triptych import backends
    from triptych.backends.torch.baseline_queue import PlainLoop
    from triptych.core.checkpoint import FORMATS

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
        batch = benchmark._batch(spec, step)
        hyper = Hyper(step, 0.01, 1e-4, 0.9)
        draws = METHODS[spec.method.name].draws(spec, step)
        loss = engine.read(engine.train_step(batch, draws, hyper))["loss"]
        assert loop.step(batch, hyper) == pytest.approx(loss, rel=1e-4), step
    queue = engine.export_state()["memory.queue"]
    np.testing.assert_allclose(queue, loop.queue.numpy(), atol=1e-3)
    assert not np.allclose(queue[:, :24], state["memory.queue"][:, :24], atol=0.1)
    np.testing.assert_array_equal(queue[:, 24:], state["memory.queue"][:, 24:])


@pytest.mark.parametrize(
    "options", [["-c", "moco_v3/resnet50_100ep"], ["-c", "moco_v2/resnet50", "-o", "model.width=8"]]
)
def test_what_has_no_plain_loop_is_refused(options, capsys):
    assert main(["bench", "step", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: bench step: there is no plain loop of moco_v")
