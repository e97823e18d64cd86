"""Checkpoints: whole or not at all, verified, pruned, and never resumed under another spec."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from test_files_writing import raising

from triptych.core import checkpoint
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import State
from triptych.core.errors import NonFiniteError, UserError

SPEC = {
    "model": {"name": "vit", "width": 8, "depth": 1, "heads": 2, "image_size": 8, "patch_size": 4},
    "method": {"name": "moco_v3", "hidden_dim": 8, "output_dim": 4},
    "train": {"steps": 400, "batch_size": 4},
}


def make_spec(**changes: object) -> RunSpec:
    """The small spec with some dotted keys changed, written with __ for the dot."""
    tree = json.loads(json.dumps(SPEC))
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        (tree.setdefault(section, {}) if section else tree)[last] = value
    return RunSpec.model_validate(tree)


def make_state(step: int) -> State:
    """A function of the step, with every dtype that a state may have."""
    rng = np.random.default_rng(step)
    return {
        "student.encoder.w": rng.standard_normal((8, 6)).astype(np.float32),
        "student.norm.num_batches_tracked": np.array(2 * step, np.int64),
        "teacher.encoder.w": rng.standard_normal((3, 4, 5)),
        "optimizer.exp_avg.student.encoder.w": rng.standard_normal((8, 6)).astype(np.float16),
        "optimizer.step": np.array(step, np.int64),
        "queue": rng.standard_normal((4, 0)).astype(np.float32),
    }


def save(run: Path, step: int, keep: int = 3) -> Path:
    extra = {"backend": "none", "versions": {"framework": "1.0"}}
    return checkpoint.write(run, step, make_state(step), make_spec(), extra, keep=keep)


def same(a: State, b: State) -> bool:
    """Names, order, dtypes, shapes and bits."""
    return list(a) == list(b) and all(
        (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes())
        for n in a
    )


def flip(path: Path) -> None:
    """Changes one bit."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def newest(run: Path) -> tuple[Path | None, list[str]]:
    messages: list[str] = []
    return checkpoint.latest(run, messages.append), messages


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


# ------------------------------------------------------------------------------- write and read


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    assert path == tmp_path / "checkpoints" / "step-00000100"
    manifest, state = checkpoint.read(path)
    assert same(state, make_state(100))
    assert manifest.step == 100
    assert RunSpec.model_validate(manifest.spec) == make_spec()
    assert manifest.versions == {**checkpoint.versions(), "framework": "1.0"}
    assert manifest.extra == {"backend": "none"}
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "optimizer.safetensors",
        "queue.safetensors",
        "student.safetensors",
        "teacher.safetensors",
    ]


def test_the_comparison_of_states_sees_one_bit() -> None:
    other = make_state(1)
    other["teacher.encoder.w"].view(np.uint8)[0, 0, 0] ^= 1
    assert not same(make_state(1), other)
    assert not same(make_state(1), dict(reversed(make_state(1).items())))
    assert same(make_state(1), make_state(1))


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3).T, np.arange(8.0)[::2]])
def test_arrays_of_any_memory_order_are_saved_by_value(tmp_path: Path, array: np.ndarray) -> None:
    path = checkpoint.write(tmp_path, 1, {"student.w": array}, make_spec(), {}, keep=1)
    assert np.array_equal(checkpoint.read(path)[1]["student.w"], array)


def test_files_are_as_open_as_their_folder(tmp_path: Path) -> None:
    for path in save(tmp_path, 1).iterdir():
        assert path.stat().st_mode & 0o777 == tmp_path.stat().st_mode & 0 | 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    save(tmp_path, 1)
    state = make_state(2)
    state["teacher.encoder.w"][1, 2, 3] = value
    with pytest.raises(NonFiniteError, match=r"step 2: teacher\.encoder\.w .*1 of 60 values"):
        checkpoint.write(tmp_path, 2, state, make_spec(), {}, keep=1)
    assert steps(tmp_path) == [1]


# ------------------------------------------------------------------------------------ retention


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=2)
        assert steps(tmp_path) == list(range(max(1, step - 1), step + 1))
    save(tmp_path, 6, keep=1)
    assert steps(tmp_path) == [6]


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-00000002/student.safetensors").unlink()
    save(tmp_path, 3, keep=2)
    assert 1 in steps(tmp_path), "the only other whole checkpoint was removed"


def test_an_old_one_that_somebody_reads_is_removed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", raising(errno.ENOTEMPTY))  # as NFS does
        save(tmp_path, 2, keep=1)
    assert newest(tmp_path)[0] == tmp_path / "checkpoints/step-00000002"
    save(tmp_path, 3, keep=1)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000003"]


def test_going_back_loses_no_later_checkpoint(tmp_path: Path) -> None:
    for step in (1, 3):
        save(tmp_path, step)
    save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == [2, 3]


def test_a_step_is_saved_again_in_place(tmp_path: Path) -> None:
    save(tmp_path, 7)
    path = checkpoint.write(tmp_path, 7, make_state(8), make_spec(), {}, keep=3)
    assert same(checkpoint.read(path)[1], make_state(8))
    assert steps(tmp_path) == [7]


def test_leftovers_of_dead_writers_are_removed(tmp_path: Path) -> None:
    aside = tmp_path / "checkpoints" / ".step-00000001.tmp"
    aside.mkdir(parents=True)
    (aside / "student.safetensors").write_bytes(b"half")
    assert newest(tmp_path) == (None, [])
    save(tmp_path, 2)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000002"]


# -------------------------------------------------------------------------------------- resuming


def test_auto_on_a_fresh_run_finds_nothing(tmp_path: Path) -> None:
    assert checkpoint.resolve("auto", tmp_path / "none", print) is None


def test_resume_takes_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    elsewhere = tmp_path / "elsewhere"
    assert checkpoint.resolve("auto", tmp_path, print) == second
    assert checkpoint.resolve(str(first), elsewhere, print) == first
    assert checkpoint.resolve(str(tmp_path), elsewhere, print) == second
    assert checkpoint.resolve(str(tmp_path / "checkpoints"), elsewhere, print) == second
    renamed = first.rename(tmp_path / "best")
    assert checkpoint.resolve(str(renamed), elsewhere, print) == renamed
    assert checkpoint.read(renamed)[0].step == 1


def test_resume_says_what_is_wrong_with_a_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("none", "none: does not exist; give a checkpoint, a run folder or auto"),
        ("file", "file: is not a folder"),
        (".", "no checkpoint there"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.resolve(str(tmp_path / name), tmp_path, print)
    with pytest.raises(UserError, match="no such checkpoint folder"):
        checkpoint.read(tmp_path / "none")


def test_a_run_is_not_begun_anew_because_all_is_damaged(tmp_path: Path) -> None:
    flip(save(tmp_path, 1) / "student.safetensors")
    messages: list[str] = []
    with pytest.raises(UserError, match="every checkpoint is damaged; remove the folder"):
        checkpoint.resolve("auto", tmp_path, messages.append)
    assert len(messages) == 1 and "no other one is left" in messages[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "paddle"},
        {"device": "cpu"},
        {"threads": 3},
        {"data__workers": 4},
        {"data__prefetch": 9},
        {"log__every": 3},
        {"checkpoint__every": 5},
        {"evaluate__every": 7},
        {"train__stop_at": 9},
        {"augment__eval_resize": None, "augment__eval_interpolation": "bicubic"},
    ],
)
def test_what_changes_no_number_may_change(tmp_path: Path, changes: dict[str, object]) -> None:
    manifest, _ = checkpoint.read(save(tmp_path, 1))
    assert checkpoint.check_spec(manifest, make_spec(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 0 -> 1"),
        ({"precision": "float64"}, "precision float32 -> float64"),
        ({"model__width": 16}, "model.width 8 -> 16"),
        ({"method__temperature": 0.5}, "method.temperature 0.2 -> 0.5"),
        ({"optim__lr": 0.1}, "optim.lr 0.00015 -> 0.1"),
        ({"optim__clip_norm": 1.0}, "optim.clip_norm not set -> 1.0"),
        ({"train__steps": 500}, "train.steps 400 -> 500"),
        ({"data__name": "cifar10", "data__root": "x"}, "data.name digits -> cifar10"),
        ({"augment__engine": "opencv"}, "augment.engine pillow -> opencv"),
        ({"augment__mean": (0.5,)}, r"augment.mean \[0.485, 0.456, 0.406\] -> \[0.5\]"),
    ],
)
def test_what_changes_the_run_is_an_error(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    manifest, _ = checkpoint.read(save(tmp_path, 1))
    with pytest.raises(UserError, match=message) as caught:
        checkpoint.check_spec(manifest, make_spec(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("features", "free"), [("augmented", True), ("cached", False)])
def test_a_probe_of_cached_features_learns_from_evaluation_pictures(
    tmp_path: Path, features: str, free: bool
) -> None:
    probe = {"name": "linear", "classes": 10, "features": features}
    spec = make_spec(method=probe, optim={"name": "sgd"})
    extra = {"backend": "none", "versions": {"framework": "1.0"}}
    manifest, _ = checkpoint.read(checkpoint.write(tmp_path, 1, make_state(1), spec, extra, keep=3))
    other = make_spec(method=probe, optim={"name": "sgd"}, augment__eval_resize=1.0)
    if free:
        assert checkpoint.check_spec(manifest, other) == []
        return
    with pytest.raises(UserError, match=r"augment.eval_resize 1\.14.* -> 1\.0"):
        checkpoint.check_spec(manifest, other)


def test_every_differing_key_is_listed_until_there_are_too_many(tmp_path: Path) -> None:
    manifest, _ = checkpoint.read(save(tmp_path, 1))
    with pytest.raises(UserError, match=r"seed 0 -> 1, model.depth 1 -> 2\)"):
        checkpoint.check_spec(manifest, make_spec(seed=1, model__depth=2, threads=1))
    many = {f"optim__{k}": 0.5 for k in ("lr", "weight_decay", "eps", "clip_norm", "end_lr")}
    many |= {f"method__{k}": 2 for k in ("hidden_dim", "output_dim", "projector_layers")}
    with pytest.raises(UserError, match="and 2 more"):
        checkpoint.check_spec(manifest, make_spec(seed=1, model__depth=2, **many))


def test_data_may_move_but_not_unnoticed(tmp_path: Path) -> None:
    here = make_spec(data__name="cifar10", data__root="/here")
    path = checkpoint.write(tmp_path, 1, make_state(1), here, {}, keep=1)
    manifest, _ = checkpoint.read(path)
    there = make_spec(data__name="cifar10", data__root="/there")
    (note,) = checkpoint.check_spec(manifest, there)
    assert note.startswith("data.root: /here -> /there: ")


def test_keys_younger_than_the_checkpoint_have_their_defaults(tmp_path: Path) -> None:
    manifest, _ = checkpoint.read(save(tmp_path, 1))
    older = manifest.model_copy(
        update={"spec": {k: v for k, v in manifest.spec.items() if k != "seed"}}
    )
    assert checkpoint.check_spec(older, make_spec()) == []
    unknown = manifest.model_copy(update={"spec": {**manifest.spec, "frobnicate": 1}})
    with pytest.raises(UserError, match=r"written by triptych .* does not fit"):
        checkpoint.check_spec(unknown, make_spec())


def test_other_versions_are_told(tmp_path: Path) -> None:
    manifest, _ = checkpoint.read(save(tmp_path, 1))
    now = manifest.versions
    assert checkpoint.stamp_warnings(manifest, now) == []
    (line,) = checkpoint.stamp_warnings(manifest, {**now, "pillow": "13.0.0", "other": "1"})
    assert line.startswith(f"pillow {now['pillow']} wrote this checkpoint, 13.0.0 goes on")
    assert "pixels" in line
