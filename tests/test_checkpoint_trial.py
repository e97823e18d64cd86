"""A folder is tried before the first step, and refused or warned of in one line."""

import errno
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.double import finished, install, saved, tiny
from test_checkpoint_faults import small_disk
from test_files_writing import raising

from triptych.core import checkpoint
from triptych.core.errors import UserError
from triptych.core.training.trainer import Trainer

FILES = {"student.safetensors": 4096, "optimizer.safetensors": 8192}


def try_out(folder: Path) -> list[str]:
    """The lines of a trial; nothing is left of it."""
    said: list[str] = []
    checkpoint.try_out(folder, FILES, 3, said.append)
    assert not list(folder.iterdir())
    return said


def refuse_trial(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        try_out(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert "--output" in str(caught.value)


def no_folder_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a share that syncs files only."""
    honest = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raising(errno.EINVAL)()
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_good_folder_says_nothing(tmp_path: Path) -> None:
    assert try_out(tmp_path) == []


def test_the_files_of_a_checkpoint_are_known_before(tmp_path: Path) -> None:
    finished(tiny("train.stop_at=1"), tmp_path, say=lambda line: None)
    path = tmp_path / "checkpoints" / "step-00000001"
    manifest, state = checkpoint.read(path)
    sizes = checkpoint.sizes({name: array.shape for name, array in state.items()}, 8)
    assert set(sizes) == set(manifest.files)
    for name, entry in manifest.files.items():
        assert sizes[name] <= entry.size <= sizes[name] + 8192, "a header is added"


@pytest.fixture(autouse=True)
def numpy_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def test_a_folder_that_cannot_be_synced_is_said_once_and_trained_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_folder_sync(monkeypatch)
    said: list[str] = []
    finished(tiny("train.stop_at=4"), tmp_path, say=said.append)
    assert saved(tmp_path) == ["step-00000004"]
    assert [line for line in said if "cannot sync a folder" in line] == [
        f"warning: {tmp_path}: the file system cannot sync a folder; the run does without, and a "
        "power cut may cost its newest checkpoint"
    ]


@pytest.mark.parametrize(
    ("owner", "function", "number", "operation"),
    [
        (Path, "mkdir", errno.EROFS, "make a folder"),
        (os, "posix_fallocate", errno.EDQUOT, "write a checkpoint's file of 0.0041 MB"),
        (os, "replace", errno.EEXIST, "rename a file over another one"),
        (Path, "rename", errno.EXDEV, "rename a folder"),
        (os, "fsync", errno.EIO, "write a file"),
        (os, "rmdir", errno.EPERM, "remove a folder"),
    ],
)
def test_what_a_checkpoint_needs_is_tried(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    function: str,
    number: int,
    operation: str,
) -> None:
    monkeypatch.setattr(owner, function, raising(number))
    with pytest.raises(UserError) as caught:
        checkpoint.try_out(tmp_path, FILES, 3)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: cannot {operation} there: {os.strerror(number)}; ")
    assert "--output" in message and "\n" not in message


def test_a_limit_on_the_size_of_files_is_met_before_the_first_step(tmp_path: Path) -> None:
    with small_disk():
        refuse_trial(tmp_path, "File too large; free some space")


def test_names_that_are_too_long_are_met_before_the_first_step(tmp_path: Path) -> None:
    folder = tmp_path
    while len(str(folder)) < os.pathconf("/", "PC_PATH_MAX") - 256 - 60:
        folder = folder / ("x" * 250)
    folder = folder / ("y" * (os.pathconf("/", "PC_PATH_MAX") - len(str(folder)) - 40))
    os.makedirs(folder)
    refuse_trial(folder, "File name too long")


def test_a_folder_that_does_not_tell_its_room_is_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", raising(errno.EOPNOTSUPP))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    assert try_out(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", raising(errno.ENOSYS))
    assert try_out(tmp_path) == []


def test_a_disk_without_room_is_refused_and_one_with_little_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(FILES.values())

    def free(count: float) -> None:
        usage = SimpleNamespace(total=10**9, free=count * size)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    free(4)
    assert try_out(tmp_path) == []
    free(3.9)
    (line,) = try_out(tmp_path)
    assert line.startswith(f"warning: {tmp_path}: no room for checkpoint.keep 3 checkpoints")
    free(0.9)
    refuse_trial(tmp_path, "no room for a checkpoint: .* free some space")


def test_a_refused_folder_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Trainer, "_advance", lambda self, batch: steps.append(self.step))
    monkeypatch.setattr(os, "replace", raising(errno.EEXIST))
    with pytest.raises(UserError, match="cannot rename a file over another one"):
        finished(tiny(), tmp_path)
    assert not steps and os.listdir(tmp_path) == [".lock"]
