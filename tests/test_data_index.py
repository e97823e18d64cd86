"""Index files: what was found is remembered, and found again after any change."""

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.data_specs import folder_spec, keys, labels, make_spec, write_images

from triptych.core.config.spec import RunSpec
from triptych.core.data import Source, index, listing, open_splits, open_train, scan, split_digest
from triptych.core.data import tars as tar_room


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few images are remembered too, and at once; the cache is the test's own."""
    monkeypatch.setattr(index, "FEWEST", 1)
    monkeypatch.setattr(index, "SETTLED", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that are read in full."""
    read: list[str] = []

    def counted(root: str, *rest: Any) -> scan.Scan:
        read.append(root)
        return scan.scan(root, *rest)

    monkeypatch.setattr(listing, "scan", counted)
    return read


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    write_images(root, ["cat/1.png", "cat/deep/2.png", f"dog/{os.fsdecode(b'caf_')}.png"])
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("no picture")
    return root


def opened(spec: RunSpec) -> tuple[Source, list[str]]:
    """The training split, and the lines said meanwhile."""
    lines: list[str] = []
    return open_splits(spec, held_out=False, say=lines.append).train, lines


def test_a_folder_is_read_once(photos, scans, tmp_path):
    spec = folder_spec(photos)
    first, lines = opened(spec)
    (file,) = (tmp_path / "cache" / "triptych").iterdir()
    assert lines == [f"data.index: 3 images remembered in {file}"] and scans == [str(photos)]
    again, lines = opened(spec)
    assert lines == [] and len(scans) == 1
    assert keys(again) == keys(first) and labels(again) == labels(first) == [0, 0, 1]
    assert again.classes == first.classes == ("cat", "dog")
    assert split_digest(again) == split_digest(first)
    assert again.image(2) == first.image(2)
    assert list(open_splits(spec).notes()) == [
        f"data.root: {photos}: passed over: 1 .txt",
        f"data.root: {photos}: no images in 1 of the class folders, which are no classes: 'empty'",
    ]
    assert b"\x80" not in np.load(file, allow_pickle=False)["header"].tobytes()


CHANGES = {
    "a new image": lambda root: write_images(root, ["cat/deep/3.png"]),
    "a new class": lambda root: write_images(root, ["bee/1.png"]),
    "an image removed": lambda root: (root / "cat" / "1.png").unlink(),
    "an image renamed": lambda root: (root / "cat" / "1.png").rename(root / "cat" / "0.png"),
    "a folder removed": lambda root: (root / "empty").rmdir(),
    "an image in a file of unknown ending": lambda root: Image.new("L", (8, 8)).save(
        root / "notes.txt", "PNG"
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_read_again(photos, scans, change):
    opened(folder_spec(photos))
    times = {path: path.stat() for path in (photos, photos / "cat", photos / "cat" / "deep")}
    change(photos)
    for path, status in times.items():  # as a copying program does that keeps times
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after, _ = opened(folder_spec(photos))
    assert len(scans) == 2
    assert keys(after) == keys(open_train(folder_spec(photos, index=None)))


def test_nothing_is_remembered_if_nothing_shall_be(photos, scans, tmp_path):
    for _ in range(2):
        assert opened(folder_spec(photos, index=None))[1] == []
    assert len(scans) == 2 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("name", "value"), [("FEWEST", 4), ("SETTLED", 10**12)])
def test_small_and_changing_folders_are_not_remembered(photos, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(index, name, value)
    assert opened(folder_spec(photos))[1] == []
    assert not (tmp_path / "cache").exists()


def test_the_index_may_lie_in_a_folder_of_its_own(photos, scans, tmp_path):
    spec = folder_spec(photos, index=str(tmp_path / "shared"))
    (line,) = opened(spec)[1]
    assert line.startswith(f"data.index: 3 images remembered in {tmp_path}/shared/index-")
    opened(spec)
    assert len(scans) == 1


def test_a_folder_that_cannot_be_written_is_told(photos, scans, tmp_path):
    (tmp_path / "file").write_text("")
    source, (line,) = opened(folder_spec(photos, index=str(tmp_path / "file")))
    assert len(source) == 3
    assert line.startswith(f"data.index: {tmp_path}/file/index-")
    assert "cannot write: " in line and "set data.index to another folder, or to null" in line


def damaged(file: Path) -> dict[str, bytes]:
    whole = file.read_bytes()
    arrays = dict(np.load(file))
    shifted = io.BytesIO()
    np.savez(shifted, **{**arrays, "names.ends": arrays["names.ends"][::-1]})
    partial = io.BytesIO()
    np.savez(partial, **{name: arrays[name] for name in arrays if name != "stamps"})
    other = io.BytesIO()
    header = arrays["header"].tobytes().replace(b"Pillow ", b"Pilow ")
    np.savez(other, **{**arrays, "header": np.frombuffer(header, np.uint8)})
    return {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "a bit": whole[:200] + bytes([whole[200] ^ 1]) + whole[201:],
        "no archive": b"hello",
        "ends of names": shifted.getvalue(),
        "without times": partial.getvalue(),
        "other rules": other.getvalue(),
    }


def test_a_damaged_index_is_written_anew(photos, scans, tmp_path):
    spec = folder_spec(photos)
    expected = keys(opened(spec)[0])
    (file,) = (tmp_path / "cache" / "triptych").iterdir()
    for number, (name, content) in enumerate(damaged(file).items(), 2):
        file.write_bytes(content)
        source, lines = opened(spec)
        assert len(scans) == number and keys(source) == expected, name
        assert len(lines) == 1 and len(list(file.parent.iterdir())) == 1
        opened(spec)
        assert len(scans) == number


def test_progress_is_said_while_a_large_folder_is_read(photos, monkeypatch):
    monkeypatch.setattr(scan, "PERIOD", 0.0)
    lines = opened(folder_spec(photos))[1]
    assert lines[0] == f"data.root: {photos}: looking for images: 0 files so far"


def test_tars_are_read_once(tmp_path, monkeypatch):
    read: list[str] = []
    before = tar_room._members
    monkeypatch.setattr(tar_room, "_members", lambda path: read.append(path) or before(path))
    picture = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(picture, "PNG")

    def write(name: str, label: bytes) -> None:
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, content in (("a.png", picture.getvalue()), ("a.cls", label)):
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))

    write("0.tar", b"cat")
    spec = make_spec({"name": "webdataset", "root": str(tmp_path)})
    for count, change in ((1, None), (1, None), (2, b"dog"), (4, b"new")):
        if change == b"dog":
            write("0.tar", change)
        elif change == b"new":
            write("1.tar", change)
        source, _ = opened(spec)
        assert len(read) == count
        assert source.image(0).getpixel((4, 4)) == (255, 0, 0)
    monkeypatch.setattr(scan, "PERIOD", 0.0)
    write("1.tar", b"newer")
    assert opened(spec)[1][0] == f"data.root: {tmp_path}: looking for images: 0 files so far"
    assert source.classes == ("dog", "new") and labels(source) == [0, 1]
    assert keys(source) == ["0.tar/a.png", "1.tar/a.png"]
