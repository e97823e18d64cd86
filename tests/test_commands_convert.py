"""``tools/convert.py``: the table, JSON, the list of formats, errors in one line."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import foreign
from support.golden_weights import official_state

from triptych.core import checkpoint, config, launch
from triptych.core.cli import main
from triptych.core.files.reading import read

PLSC = foreign.FILES / "plsc_moco_v3_vit.pd"


def convert(*words: Any, status: int = 0) -> None:
    assert main(["convert", *map(str, words)]) == status


def test_the_table_says_what_happens(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    convert(PLSC, tmp_path / "w.pth", "--to", "moco_v3", "-o", "model.heads=3")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{PLSC}: paddle, MoCo v3 pretraining (plsc), state_dict, 94 tensors"
    assert lines[1].startswith("to moco_v3: MoCo v3 pretraining; ViT of width 24, 2 blocks, 3 hea")
    counts = {line.strip() for line in lines if line.startswith("  ") and ":" in line}
    assert counts >= {"transposed: 24", "new, at its initial value: 8", "unused: 0", "missing: 0"}
    assert any("(24, 96) -> base_encoder.blocks.0.mlp.fc1.weight" in line for line in lines)
    found = re.fullmatch(r"self-check, teacher: .* features (\S+) \(plsc\).*", lines[-2])
    assert found and float(found[1]) < 1e-13  # the order of sums depends on NumPy's kernels
    assert lines[-1].startswith(f"{tmp_path}/w.pth: torch, 0.")
    assert read(tmp_path / "w.pth").tree.keys() >= {"epoch", "state_dict"}


def test_json_has_everything_and_a_dry_run_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "w.pth"
    words = ("--to", "libai", "--branch", "teacher", "-o", "model.heads=3", "--json")
    convert(PLSC, out, *words, "--dry-run")
    found = json.loads(capsys.readouterr().out)
    assert not out.exists()
    rows = {row["canonical"]: row for row in found["tensors"]}
    qkv = rows["student.encoder.blocks.1.attn.qkv.weight"]
    assert qkv == {
        "from": {"momentum_encoder.blocks.1.attn.qkv.weight": [24, 72]},
        "canonical": "student.encoder.blocks.1.attn.qkv.weight",
        "to": {"blocks.1.self_attention.query_key_value.weight": [72, 24]},
        "changes": ["transposed", "permuted"],
    }
    assert found["self_check"].keys() == {"teacher"} and found["problems"] == []
    assert found["left_out"]["momentum_encoder.head.0.weight"] and not found["optimizer"]
    convert(PLSC, *words, "--dry-run")  # the destination is not needed


def test_the_list_has_each_format(capsys: pytest.CaptureFixture[str]):
    convert("--list")
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names[:4] == ["canonical", "torch", "oneflow", "paddle"] and len(names) > 10
    widths = {line.index(line.split("  ")[-1].strip()) for line in lines}
    assert len(widths) <= 2  # columns
    assert any(line.split()[:3] == ["plsc", "read,", "write"] for line in lines)
    assert any(line.split()[:2] == ["solo", "read"] for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "convert: give SRC, DST and --to FORMAT, or --list"),
        ((PLSC, "--to", "moco_v3"), "convert: DST is missing; give one, or --dry-run"),
        ((PLSC, "out", "--to", "plsk"), "--to plsk: unknown; known are canonical, torch"),
        ((PLSC, "out", "--from", "x", "--to", "plsc"), "format 'x': unknown; known are"),
        ((PLSC, "out", "--to", "plsc", "--parts", "eyes"), "--parts eyes: expected encoder,"),
        ((PLSC, "out", "--to", "plsc", "--image-size", 1, 2, 3), "--image-size: expected one"),
        (("nothing", "out", "--to", "plsc"), "nothing: no such file"),
        (("hostile", "out", "--to", "plsc"), "it wants to use os.system: refused"),
    ],
)
def test_errors_are_one_line(
    words: tuple[Any, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
    convert(*words, status=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert os.listdir(tmp_path) == ["hostile"]


def test_a_refused_conversion_still_shows_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arrays = dict(official_state("moco_v3_vit_tiny"))
    del arrays["base_encoder.norm.bias"]
    np.savez(tmp_path / "w.npz", **arrays)
    words = ("--to", "canonical", "-o", "model.heads=3")
    convert(tmp_path / "w.npz", tmp_path / "c", *words, status=2)
    output = capsys.readouterr()
    assert "  missing: 1\n    student.encoder.norm.bias" in output.out
    assert output.err.startswith(f"error: {tmp_path}/w.npz: missing student.encoder.norm.bias")
    assert not (tmp_path / "c").exists()


def test_training_goes_on_from_what_was_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A checkpoint becomes a file of MoCo v3, and that a checkpoint that the recipe resumes."""
    keys = ["train.steps=4", "optim.warmup_steps=0", "threads=1"]
    spec = config.load("moco_v3/digits", keys)
    engine = launch.open_engine(spec, launch.REFERENCE, checkpoint_state(spec))
    state = engine.export_state()
    saved = checkpoint.write(tmp_path / "run", 0, state, spec, {}, keep=1)
    convert(saved, tmp_path / "w.pth", "--to", "moco_v3")
    words = ("-c", "moco_v3/digits", "-o", *keys)
    convert(tmp_path / "w.pth", tmp_path / "back", "--to", "canonical", *words)
    manifest, again = checkpoint.read(tmp_path / "back")
    assert checkpoint.check_spec(manifest, spec) == []
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[name], state[name]) for name in state)


def checkpoint_state(spec: Any) -> dict[str, np.ndarray]:
    from triptych.core.parameters import initial_state

    return initial_state(spec)
