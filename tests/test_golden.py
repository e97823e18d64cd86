"""Training steps of every backend against numbers recorded from the reference implementations.

The weights, images and hyper-parameters of a case are made by the rules in golden/README.md; the
replay goes through the official names and ``trace``.
"""

import json

import numpy as np
import pytest
from conftest import assert_close
from golden_weights import GOLDEN, description, official_state, probe, views

from triptych.core import algorithms, checkpoint, config
from triptych.core.checkpoint.moco_v3 import names, to_canonical
from triptych.core.cli import main
from triptych.core.engine import Batch, Hyper
from triptych.core.parity import trace

SPECS = GOLDEN / "specs"
CASES = ["moco_v3_vit_tiny", "moco_v3_vit_s16_224"]


def hyper_of(case: str, step: int = 0) -> Hyper:
    settings = description(case)["config"]
    return Hyper(step, settings["lr"], settings["wd"], settings["m"])


def summary(record) -> dict[str, np.ndarray]:
    """A record with gradients and states reduced to (norm, probe): whole models are large."""
    reduced = {}
    for name, array in record:
        kind = name.partition("/")[0]
        if name.startswith("state/optimizer."):
            continue  # the golden numbers have no moments
        if kind in ("grad", "state"):
            norm = float(np.linalg.norm(array.astype(np.float64)))
            reduced[name] = np.array([norm, probe(array)])
        else:
            reduced[name] = array
    return reduced


def replay(backend_name, case, precision="float64", steps=None, change=lambda state: state):
    spec = config.load(SPECS / f"{case}.yaml", [f"precision={precision}", "threads=2"])
    steps = steps or description(case)["config"]["steps"]
    state = change(to_canonical(official_state(case), spec))
    index = np.arange(spec.train.batch_size)
    batches = (Batch(views(case, step), index) for step in range(steps))
    return summary(
        trace.trace(
            spec, backend_name, state, batches, lambda _: {}, lambda k: hyper_of(case, k), steps
        )
    )


def disagreements(got: dict[str, np.ndarray], case: str) -> list[str]:
    """What of a float64 replay differs from the golden numbers by more than is allowed."""
    wrong, noise = [], set()
    told = description(case)
    canonical = names(config.load(SPECS / f"{case}.yaml"))
    official = {o: c for c, o in canonical.items()}
    with np.load(GOLDEN / f"{case}.npz") as golden:

        def check(name, error, allowed):
            if not error <= allowed:
                wrong.append(f"{name}: {error:.2e} > {allowed:.0e}")

        for ours, theirs in (("backbone", "feat_backbone"), ("proj", "feat_proj")):
            gap = np.abs(got[f"feature/{ours}"] - golden[theirs]).max()
            check(theirs, gap / np.abs(golden[theirs]).max(), 1e-10)
        for step in range(len(got["loss"])):
            loss = golden["loss"][step]
            check(f"loss/{step}", abs(got["loss"][step] - loss) / loss, 1e-10)
            for name in ("q1", "q2", "k1", "k2"):
                key = f"{name}/step{step}"
                gap = np.abs(got[f"feature/{key}"] - golden[key]).max()
                check(key, gap / np.abs(golden[key]).max(), 1e-10)
            total = np.linalg.norm(golden["grad_norm"][step])
            for i, name in enumerate(told["trainable_names"]):
                norm = golden["grad_norm"][step, i]
                if norm <= 1e-9 * total:
                    noise.add(name)
                else:
                    gap = abs(
                        got[f"grad/{official[name]}/step{step}"][1] - golden["grad_probe"][step, i]
                    )
                    check(f"grad {name}/{step}", gap / norm, 1e-8)
        for step in range(len(got["loss"]) + 1):
            for i, entry in enumerate(told["state"]):
                norm = golden["state_norm"][step, i]
                gap = abs(
                    got[f"state/{official[entry['name']]}/step{step}"][1]
                    - golden["state_probe"][step, i]
                )
                # AdamW makes steps of any size of a gradient that is only rounding.
                source = entry["name"].replace("momentum_encoder", "base_encoder")
                allowed = 1e-6 if source in noise else 1e-8
                # A running mean behind a norm without shift is zero but for rounding.
                check(f"state {entry['name']}/{step}", gap / max(norm, 1e-6), allowed)
    return wrong


@pytest.mark.parametrize("case", CASES)
def test_replay_in_float64(backend, backend_name, case):
    assert disagreements(replay(backend_name, case), case) == []


def test_the_reference_replays_too():
    assert disagreements(replay("numpy", "moco_v3_vit_tiny"), "moco_v3_vit_tiny") == []


@pytest.mark.parametrize("case", CASES)
def test_replay_in_float32(backend, backend_name, case):
    # Beyond step 0 the large case says nothing in float32 (golden/README.md, section 3).
    steps = {"moco_v3_vit_tiny": 3, "moco_v3_vit_s16_224": 1}[case]
    got = replay(backend_name, case, "float32", steps)
    assert got["loss"].dtype == np.float32
    with np.load(GOLDEN / f"{case}.npz") as golden:
        assert_close(got["loss"][:1], golden["loss"][:1], 1e-5)
        assert_close(got["loss"], golden["loss"][:steps], 1e-4)


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
        swapped[name] = state.get(f"{other[branch]}.{rest}", value)
    return swapped


@pytest.mark.parametrize("change", [transposed, interleaved, rows_for_columns, branches_swapped])
def test_wrong_weights_are_noticed(backend, backend_name, change):
    case = "moco_v3_vit_tiny"
    assert disagreements(replay(backend_name, case, steps=1, change=change), case)


def key_before_ema(ops, model, views, draws, hyper, spec):
    """The teacher moves too late: its keys are those of the step before."""
    q1, q2 = model.query(views[0]), model.query(views[1])
    with ops.no_grad():
        k1, k2 = model.key(views[0]), model.key(views[1])
        model.update_teacher(hyper.ema)
    return algorithms.moco_v3.outcome(ops, q1, q2, k1, k2, spec)


def detached_query(ops, model, views, draws, hyper, spec):
    """The second view's query passes no gradient."""
    q1 = model.query(views[0])
    with ops.no_grad():
        q2 = model.query(views[1])
        model.update_teacher(hyper.ema)
        k1, k2 = model.key(views[0]), model.key(views[1])
    return algorithms.moco_v3.outcome(ops, q1, q2, k1, k2, spec)


def views_joined(ops, model, views, draws, hyper, spec):
    """The student sees view 2 first: its running statistics move in another order."""
    q2, q1 = model.query(views[1]), model.query(views[0])
    with ops.no_grad():
        model.update_teacher(hyper.ema)
        k1, k2 = model.key(views[0]), model.key(views[1])
    return algorithms.moco_v3.outcome(ops, q1, q2, k1, k2, spec)


def keys_swapped(ops, model, views, draws, hyper, spec):
    """Each query meets the key of its own view."""
    q1, q2 = model.query(views[0]), model.query(views[1])
    with ops.no_grad():
        model.update_teacher(hyper.ema)
        k2, k1 = model.key(views[0]), model.key(views[1])
    return algorithms.moco_v3.outcome(ops, q1, q2, k1, k2, spec)


@pytest.mark.parametrize("forward", [key_before_ema, detached_query, views_joined, keys_swapped])
def test_a_wrong_step_is_noticed(backend, backend_name, forward, monkeypatch):
    monkeypatch.setattr(algorithms.moco_v3, "forward", forward)
    case = "moco_v3_vit_tiny"
    assert disagreements(replay(backend_name, case, steps=1), case)


def test_trace_from_files(backend, backend_name, tmp_path, capsys):
    """The same replay as a user runs it: official names in a file, images in another."""
    case = "moco_v3_vit_tiny"
    np.savez(tmp_path / "weights.npz", **official_state(case))
    one, two = zip(*(views(case, step) for step in range(3)), strict=True)
    np.savez(tmp_path / "inputs.npz", view1=np.stack(one), view2=np.stack(two))
    fixed = hyper_of(case)
    (tmp_path / "hyper.json").write_text(
        json.dumps({"lr": fixed.lr, "weight_decay": fixed.weight_decay, "ema": fixed.ema})
    )
    command = f"parity trace --backend {backend_name} --steps 3 -c".split()
    command.append(str(SPECS / f"{case}.yaml"))
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
    assert disagreements(summary(checkpoint.read_arrays(tmp_path / "out.npz").items()), case) == []
