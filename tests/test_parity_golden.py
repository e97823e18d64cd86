"""Training steps of every backend against numbers recorded from the reference implementations.

The weights, images and hyper-parameters of a case are made by the rules in golden/README.md; the
replay goes through the official names and ``trace``.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import assert_close
from support.golden_replay import (
    CASES,
    disagreements,
    draws_of,
    hyper_of,
    replay,
    spec_file,
    summary,
)
from support.golden_weights import GOLDEN, official_state, views

from triptych.core import formats, methods
from triptych.core.cli import main


@pytest.mark.parametrize("case", CASES)
def test_replay_in_float64(backend, backend_name, case):
    assert disagreements(replay(backend_name, case), case) == []


@pytest.mark.parametrize("case", ["moco_v3_vit_tiny", "moco_v3_vit_conv_tiny", "moco_v1_resnet18"])
def test_the_reference_replays_too(case):
    assert disagreements(replay("numpy", case), case) == []


LARGE = ("moco_v3_vit_s16_224", "moco_v2_resnet50", "moco_v3_resnet50")
"""Cases whose float32 replay `make soak` holds. Small cases show the same rounding."""
SINGLE = [pytest.param(c, marks=[pytest.mark.soak] if c in LARGE else []) for c in CASES]


@pytest.mark.parametrize("case", SINGLE)
def test_replay_in_float32(backend, backend_name, case):
    got = replay(backend_name, case, "float32", CASES[case])
    assert got["loss"].dtype == np.float32
    with np.load(GOLDEN / f"{case}.npz") as golden:
        assert_close(got["loss"][:1], golden["loss"][:1], 1e-5)
        assert_close(got["loss"], golden["loss"][: CASES[case]], 1e-4)


def transposed(state):
    name = "student.encoder.blocks.1.attn.proj.weight"
    return {**state, name: state[name].T.copy()}


def interleaved(state):
    """The query, key and value rows of each head side by side, as some frameworks keep them."""
    name = "student.encoder.blocks.0.attn.qkv.weight"
    rows = state[name].reshape(3, 3, -1, state[name].shape[1])
    return {**state, name: rows.swapaxes(0, 1).reshape(state[name].shape)}


def rows_for_columns(state):
    name = "student.encoder.pos_embed"
    table = state[name].copy()
    grid = table[0, 1:].reshape(4, 4, -1).swapaxes(0, 1)
    table[0, 1:] = grid.reshape(16, -1)
    return {**state, name: table}


def branches_swapped(state):
    other = {"student": "teacher", "teacher": "student"}
    swapped = {}
    for name, value in state.items():
        branch, _, rest = name.partition(".")
        swapped[name] = state.get(f"{other.get(branch)}.{rest}", value)
    return swapped


def kernels_turned(state):
    """Rows and columns of the kernels exchanged: every shape stays as it was."""
    turned = {n: a.swapaxes(2, 3).copy() for n, a in state.items() if a.ndim == 4}
    return {**state, **turned}


def norms_swapped(state):
    """The first block's two norms exchanged."""
    one, two = (f"student.encoder.layer1.0.bn{i}.weight" for i in (1, 2))
    return {**state, one: state[two], two: state[one]}


def queue_reversed(state):
    """The oldest keys at the other end."""
    return {**state, "memory.queue": state["memory.queue"][:, ::-1].copy()}


def pointer_moved(state):
    return {**state, "memory.pointer": np.array(8)}


@pytest.mark.parametrize("change", [transposed, interleaved, rows_for_columns, branches_swapped])
def test_wrong_weights_are_noticed(backend, backend_name, change):
    case = "moco_v3_vit_tiny"
    assert disagreements(replay(backend_name, case, steps=1, change=change), case)


@pytest.mark.parametrize(
    "change", [kernels_turned, norms_swapped, queue_reversed, pointer_moved, branches_swapped]
)
def test_wrong_weights_of_a_queue_method_are_noticed(backend, backend_name, change):
    case = "moco_v1_resnet18"
    assert disagreements(replay(backend_name, case, steps=1, change=change), case)


def key_before_ema(ops, model, batch, draws, hyper, spec):
    """The teacher moves too late: its keys are those of the step before."""
    q1, q2 = model.query(batch.views[0]), model.query(batch.views[1])
    with ops.no_grad():
        k1, k2 = model.key(batch.views[0]), model.key(batch.views[1])
        model.update_teacher(hyper.ema)
    return methods.moco_v3.outcome(ops, q1, q2, k1, k2, spec)


def detached_query(ops, model, batch, draws, hyper, spec):
    """The second view's query passes no gradient."""
    q1 = model.query(batch.views[0])
    with ops.no_grad():
        q2 = model.query(batch.views[1])
        model.update_teacher(hyper.ema)
        k1, k2 = model.key(batch.views[0]), model.key(batch.views[1])
    return methods.moco_v3.outcome(ops, q1, q2, k1, k2, spec)


def views_joined(ops, model, batch, draws, hyper, spec):
    """The student sees view 2 first: its running statistics move in another order."""
    q2, q1 = model.query(batch.views[1]), model.query(batch.views[0])
    with ops.no_grad():
        model.update_teacher(hyper.ema)
        k1, k2 = model.key(batch.views[0]), model.key(batch.views[1])
    return methods.moco_v3.outcome(ops, q1, q2, k1, k2, spec)


def keys_swapped(ops, model, batch, draws, hyper, spec):
    """Each query meets the key of its own view."""
    q1, q2 = model.query(batch.views[0]), model.query(batch.views[1])
    with ops.no_grad():
        model.update_teacher(hyper.ema)
        k2, k1 = model.key(batch.views[0]), model.key(batch.views[1])
    return methods.moco_v3.outcome(ops, q1, q2, k1, k2, spec)


@pytest.mark.parametrize("forward", [key_before_ema, detached_query, views_joined, keys_swapped])
def test_a_wrong_step_is_noticed(backend, backend_name, forward, monkeypatch):
    monkeypatch.setattr(methods.moco_v3, "forward", forward)
    case = "moco_v3_vit_tiny"
    assert disagreements(replay(backend_name, case, steps=1), case)


def moco_step(order_of_keys=np.argsort, late_ema=False):
    """MoCo's forward pass, with the keys put in the order ``order_of_keys(shuffle_perm)``."""

    def forward(ops, model, batch, draws, hyper, spec):
        query, order = model.query(batch.views[0]), draws["shuffle_perm"]
        with ops.no_grad():
            if not late_ema:
                model.update_teacher(hyper.ema)
            shuffled = ops.l2_normalize(model.key(ops.gather_rows(batch.views[1], order)))
            key = ops.gather_rows(shuffled, order_of_keys(order))
            if late_ema:
                model.update_teacher(hyper.ema)
        return methods.moco.outcome(ops, model, query, key, spec)

    return forward


def swapped_views(ops, model, batch, draws, hyper, spec):
    return moco_step()(ops, model, replace(batch, views=batch.views[::-1]), draws, hyper, spec)


QUEUE_STEPS = {
    "key before EMA": moco_step(late_ema=True),
    "not unshuffled": moco_step(lambda order: np.arange(len(order))),
    "shuffled twice": moco_step(lambda order: order),
    "views swapped": swapped_views,
}


@pytest.mark.parametrize("name", QUEUE_STEPS)
def test_a_wrong_step_of_a_queue_method_is_noticed(backend, backend_name, name, monkeypatch):
    monkeypatch.setattr(methods.moco, "forward", QUEUE_STEPS[name])
    case = "moco_v1_resnet18"
    assert disagreements(replay(backend_name, case, steps=1), case)


def test_the_right_step_of_a_queue_method_is_right(backend, backend_name, monkeypatch):
    monkeypatch.setattr(methods.moco, "forward", moco_step())
    case = "moco_v1_resnet18"
    assert disagreements(replay(backend_name, case, steps=1), case) == []


@pytest.mark.parametrize("case", ["moco_v3_vit_tiny", "moco_v1_resnet18"])
def test_trace_from_files(backend, backend_name, case, tmp_path, capsys):
    """The same replay as a user runs it: official names in a file, images in another."""
    np.savez(tmp_path / "weights.npz", **official_state(case))
    one, two = zip(*(views(case, step) for step in range(3)), strict=True)
    draws = [draws_of(case, step) for step in range(3)]
    stacked = {name: np.stack([drawn[name] for drawn in draws]) for name in draws[0]}
    np.savez(tmp_path / "inputs.npz", view1=np.stack(one), view2=np.stack(two), **stacked)
    fixed = hyper_of(case)
    (tmp_path / "hyper.json").write_text(
        json.dumps({"lr": fixed.lr, "weight_decay": fixed.weight_decay, "ema": fixed.ema})
    )
    command = f"parity trace --backend {backend_name} --steps 3 -c".split()
    command.append(str(spec_file(case)))
    for option, file in (
        ("--weights", "weights.npz"),
        ("--inputs", "inputs.npz"),
        ("--hyper", "hyper.json"),
        ("-o", "out.npz"),
    ):
        command += [option, str(tmp_path / file)]
    status = main(command)
    assert status == 0
    assert "loss" in capsys.readouterr().out
    assert disagreements(summary(formats.read_arrays(tmp_path / "out.npz").items()), case) == []
