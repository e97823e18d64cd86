"""The judge of two records: what it accepts, and that it notices what it should."""

import numpy as np
import pytest
from support.native import hyper, lively_state, random_batch, tiny_spec

from triptych.core.cli import main
from triptych.core.errors import UserError
from triptych.core.parity import trace
from triptych.core.parity.compare import compare, relative_error


@pytest.fixture(scope="module")
def record():
    spec = tiny_spec(model={"depth": 1})
    batches = (random_batch(spec, k) for k in range(2))
    arrays = trace.trace(spec, "numpy", lively_state(spec), batches, lambda _: {}, hyper, 2)
    return dict(arrays)


def wrong_names(a, b):
    return [d.name for d in compare(a, b)[0] if not d.ok]


def test_a_record_holds_what_scripts_rely_on(record):
    assert record["loss"].shape == (2,)
    assert record["metric/loss_q1k2"].shape == (2,)
    assert {k for k in record if k.startswith("feature/")} >= {"feature/backbone", "feature/proj"}
    for step in range(3):
        assert f"state/student.encoder.cls_token/step{step}" in record
        assert f"state/optimizer.exp_avg.student.encoder.cls_token/step{step}" in record
    assert "grad/student.encoder.cls_token/step1" in record
    assert "grad/student.encoder.cls_token/step2" not in record


def test_equal_records_agree(record):
    assert wrong_names(record, record) == []


@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "metric/loss_q1k2",
        "feature/q1/step0",
        "grad/student.encoder.blocks.0.attn.proj.weight/step1",
        "state/teacher.encoder.blocks.0.attn.proj.weight/step2",
        "state/student.projector.1.running_var/step1",
        "state/optimizer.exp_avg_sq.student.projector.3.weight/step2",
    ],
)
def test_one_changed_number_is_noticed(record, name):
    changed = dict(record)
    changed[name] = record[name].copy()
    changed[name].flat[0] += 1e-6 * max(np.abs(record[name]).max(), 1e-12)
    assert wrong_names(changed, record) == [name]


def test_a_missed_transpose_is_noticed(record):
    name = "state/student.encoder.blocks.0.attn.proj.weight/step0"
    assert wrong_names({**record, name: record[name].T}, record) == [name]


def test_a_nan_is_never_equal(record):
    assert wrong_names({**record, "loss": np.array([np.nan, 1.0])}, record) == ["loss"]
    assert relative_error(np.array([np.nan]), np.array([np.nan])) == float("inf")


def test_noise_is_left_out_and_told(record):
    names = compare(record, record)[1]
    assert "grad/student.encoder.norm.bias/step0" in names
    assert not any("qkv.weight" in name for name in names)
    # The key's third of a qkv bias has no defined gradient; query and value have.
    name = "grad/student.encoder.blocks.0.attn.qkv.bias/step0"
    third = len(record[name]) // 3
    for part, noticed in ((0, True), (third, False), (2 * third, True)):
        changed = record[name].copy()
        changed[part] += 1e-3 * np.abs(changed).max()
        assert bool(wrong_names({**record, name: changed}, record)) == noticed


def test_records_of_different_runs_are_refused(record):
    with pytest.raises(UserError, match="different arrays: loss"):
        compare({n: a for n, a in record.items() if n != "loss"}, record)


def test_compare_as_a_command(record, tmp_path, capsys):
    a, b = tmp_path / "a.npz", tmp_path / "b.npz"
    trace.save(iter(record.items()), a)
    trace.save(iter({**record, "loss": record["loss"] + 1e-6}.items()), b)
    assert main(["parity", "compare", str(a), str(a)]) == 0
    assert main(["parity", "compare", str(a), str(b)]) == 1
    assert "BAD" in capsys.readouterr().out
    assert main(["parity", "compare", str(a), str(b), "--tolerance", "loss=1e-5"]) == 0
    assert main(["parity", "compare", str(a), str(b), "--tolerance", "loss=0"]) == 1
    assert main(["parity", "compare", str(a), str(a), "--tolerance", "loss=0"]) == 0
    assert main(["parity", "compare", str(a), str(b), "--tolerance", "lass=1"]) == 2
    assert main(["parity", "compare", str(a), str(tmp_path / "none.npz")]) == 2
    assert "error: " in capsys.readouterr().err


def test_records_of_different_specs_are_told_apart(tmp_path, capsys):
    common = ["-c", "moco_v3/digits", "--backend", "numpy", "--steps", "1"]
    small = ["model.width=8", "model.depth=1", "method.hidden_dim=8", "train.batch_size=8"]
    for name, seed in (("a", 0), ("b", 3)):
        output = str(tmp_path / f"{name}.npz")
        assert main(["parity", "trace", *common, "-o", output, *small, f"seed={seed}"]) == 0
    assert main(["parity", "compare", str(tmp_path / "a.npz"), str(tmp_path / "a.npz")]) == 0
    assert "different specs" not in capsys.readouterr().out
    assert main(["parity", "compare", str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]) == 1
    assert "the records are of different specs: seed 0 and 3" in capsys.readouterr().out
