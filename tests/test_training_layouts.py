"""One run that changes layout and framework on its way, against one process left alone."""

import numpy as np
import pytest
from conftest import under_test
from support.launchers import Launch

from triptych.core import checkpoint
from triptych.core.parity.compare import compare
from triptych.core.runs.log import read_rows

KEYS = (
    *("precision=float64", "data.workers=0", "threads=1", "log.every=1", "log.tensorboard=false"),
    *("train.batch_size=16", "train.steps=10", "checkpoint.every=0", "evaluate.every=0"),
    *("model.width=32", "model.heads=4", "optim.warmup_steps=2"),
)
SECOND = {
    "data and tensor": ("data=2", "tensor=2"),
    "data and pipeline": ("data=2", "pipeline=2", "micro_batches=2"),
    "tensor and pipeline": ("tensor=2", "pipeline=2", "micro_batches=2"),
}
"""Layouts of the second station."""
CHAINS = {
    "data and tensor": ("moco_v3/digits", ("torch", "oneflow", "paddle", "torch", "oneflow")),
    "data and pipeline": ("moca/digits", ("paddle", "torch", "oneflow", "paddle", "torch")),
    "tensor and pipeline": ("moco_v3/digits", ("oneflow", "paddle", "torch", "oneflow", "paddle")),
}
"""Recipe and framework of each station, by the layout of the second one."""
LIMIT = 240.0
STEPS = 2
"""Of each station."""
MOMENT = "optimizer.exp_avg_sq."


def stations(second: str) -> list[tuple[int, tuple[str, ...]]]:
    """Number of processes and layout of each station."""
    pipeline = ("pipeline=4", "micro_batches=4")
    return [(1, ()), (4, SECOND[second]), (4, pipeline), (4, ("data=4",)), (1, ())]


def record(folder) -> dict[str, np.ndarray]:
    """A run as ``parity.compare`` wants it, the second moments in the place of gradients."""
    found = {"loss": np.array([row["loss"] for row in read_rows(folder / "metrics.jsonl")])}
    for name, array in checkpoint.read(checkpoint.latest(folder, print))[1].items():
        found[f"state/{name}/step1"] = array
        if name.startswith(MOMENT):
            found[f"grad/{name.removeprefix(MOMENT)}/step0"] = np.sqrt(array)
    return found


def train(backend: str, world: int, recipe: str, folder, name: str, *keys: str) -> None:
    words = ["train", "-c", recipe, "--backend", backend, "--output", str(folder / name)]
    words += ["--resume", "auto", "-o", *KEYS, *keys]
    launch = Launch(backend, world, words, folder / f"{name}-{'-'.join(keys)}")
    try:
        assert launch.finish(LIMIT) == 0, launch.said()
    finally:
        launch.kill()


@pytest.mark.parallel
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("second", SECOND)
def test_a_run_that_changes_layout_and_framework_is_that_of_one_process(tmp_path, second):
    names = under_test()
    recipe, order = CHAINS[second]
    order = [name if name in names else names[i % len(names)] for i, name in enumerate(order)]
    train(order[0], 1, recipe, tmp_path, "whole")
    for i, (name, (world, layout)) in enumerate(zip(order, stations(second), strict=True), 1):
        keys = [f"parallel.{key}" for key in layout]
        train(name, world, recipe, tmp_path, "moved", *keys, f"train.stop_at={i * STEPS}")
    moved, whole = record(tmp_path / "moved"), record(tmp_path / "whole")
    limits = dict.fromkeys(("loss", "grad", "state"), 1e-10)
    differences, _ = compare(moved, whole, limits)
    assert len(moved["loss"]) == 5 * STEPS
    assert [d for d in differences if not d.ok] == []
    assert sum("exp_avg_sq" in d.name for d in differences) > 20
    spoilt = "state/optimizer.exp_avg.student.encoder.blocks.1.mlp.fc1.weight/step1"
    moved[spoilt] = moved[spoilt] * (1 + 1e-9)
    assert [d.name for d in compare(moved, whole, limits)[0] if not d.ok] == [spoilt]
