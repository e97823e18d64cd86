"""WebDataset tars and parquet files of images."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.data_specs import complaint, keys, labels, make_spec

from triptych.core.data import (
    DamagedImage,
    Pipeline,
    Source,
    open_evaluation,
    open_splits,
    open_train,
    split_digest,
)
from triptych.core.random import stream


def picture(number: int, kind: str = "PNG") -> bytes:
    """An image file; each number has other pixels."""
    pixels = stream(number, "test/picture").integers(0, 256, (12, 10, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], *, mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def tar_data(root: Path | str, **data: Any) -> dict[str, Any]:
    return {"name": "webdataset", "root": str(root), **data}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two training tars of three images, and a held-out one of one image."""
    first = {"a/1.png": picture(1), "a/1.cls": b"7\n", "a/2.x.png": b"a mask", "a/2.jpg": b""}
    first["a/2.jpg"] = picture(2, "JPEG")
    first |= {"a/2.cls": b"12", "a/note.txt": b"no image"}
    write_tar(tmp_path / "train-0.tar", first)
    write_tar(
        tmp_path / "train-1.tar",
        {"../../etc/b.json": json.dumps({"label": 7}).encode(), "../../etc/b.PNG": picture(3)},
    )
    write_tar(tmp_path / "val-0.tar", {"v.webp": picture(4, "WEBP"), "v.cls": b"12"})
    return tmp_path


def test_tars_are_read_where_they_are(tars):
    data = tar_data(tars / "train-*.tar", eval_root=str(tars / "val-0.tar"))
    train, test = open_evaluation(make_spec(data)) or pytest.fail("there is a held-out split")
    assert keys(train) == [
        "train-0.tar/a/1.png",
        "train-0.tar/a/2.jpg",
        "train-1.tar/../../etc/b.PNG",
    ]
    assert train.classes == test.classes == ("7", "12")
    assert labels(train) == [0, 1, 0] and labels(test) == [1]
    assert train.name(1) == str(tars / "train-0.tar" / "a" / "2.jpg")
    for number in (1, 3):
        expected = Image.open(io.BytesIO(picture(number)))
        assert np.array_equal(np.asarray(train.image(number - 1)), np.asarray(expected))
    copied = pickle.loads(pickle.dumps(train))
    assert copied.image(2) == train.image(2)
    assert list(open_splits(make_spec(data)).notes()) == [
        f"data.root: {tars / 'train-*.tar'}: passed over: 1 .txt",
        f"data.eval_root: {tars / 'val-0.tar'}: no images of 1 of the 2 classes: '7'",
    ]
    assert not (tars / "a").exists()  # nothing is unpacked


def test_workers_read_tars_alike(tars):
    loaded = []
    for workers in (0, 2):
        spec = make_spec(tar_data(tars / "train-*.tar", workers=workers), batch_size=3)
        with Pipeline(spec, open_train(spec)) as pipeline:
            loaded.append(next(pipeline.batches(0, 1)))
    assert np.array_equal(loaded[0].views[0], loaded[1].views[0])


def test_the_webdataset_library_finds_the_same_samples(tars):
    webdataset = pytest.importorskip("webdataset", reason="the extra dev is not installed")
    urls = sorted(map(str, tars.glob("train-*.tar")))
    samples = [
        sample
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
        if {"png", "jpg"} & set(sample)
    ]
    source = open_train(make_spec(tar_data(tars / "train-*.tar")))
    assert len(samples) == len(source)
    for number, sample in enumerate(samples):
        assert os.path.splitext(source.name(number))[0].endswith(sample["__key__"].lstrip("./"))
        content = sample.get("png") or sample["jpg"]
        pixels = Image.open(io.BytesIO(content)).convert("RGB")
        assert np.array_equal(np.asarray(source.image(number)), np.asarray(pixels))
        label = sample["cls"] if "cls" in sample else str(json.loads(sample["json"])["label"])
        text = label if isinstance(label, str) else label.decode()
        assert source.classes[source.label(number)] == text.strip()


def test_a_folder_of_several_splits_is_no_training_set(tars):
    message = complaint(tar_data(tars))
    assert message.startswith(
        f"data.root: {tars}: files of several splits (train-0.tar, val-0.tar)"
    )
    assert message.endswith(f"e.g. {tars}/train-*.tar")
    (tars / "val-0.tar").rename(tars / "Validation-0.tar")
    assert "several splits (train-0.tar, Validation-0.tar)" in complaint(tar_data(tars))
    (tars / "Validation-0.tar").unlink()
    assert len(open_train(make_spec(tar_data(tars)))) == 3


def test_damaged_images_in_a_tar_can_be_skipped(tars):
    write_tar(tars / "train-1.tar", {"b.png": picture(3)[:90]})
    spec = make_spec(tar_data(tars / "train-*.tar"))
    with pytest.raises(DamagedImage, match=r"train-1\.tar/b\.png: damaged image"):
        open_train(spec).image(2)
    spec = make_spec(tar_data(tars / "train-*.tar", on_error="skip"), batch_size=3)
    with Pipeline(spec, open_train(spec)) as pipeline:
        assert len(next(pipeline.batches(0, 1)).index) == 3
        assert pipeline.skipped == [str(tars / "train-1.tar" / "b.png")]


def test_a_tar_that_shrinks_later_is_damaged(tars):
    source = open_train(make_spec(tar_data(tars / "train-0.tar")))
    os.truncate(tars / "train-0.tar", 600)
    with pytest.raises(DamagedImage, match="the tar is shorter than at the start"):
        source.image(0)


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a member."""
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a whole tar file"),
        (b"no tar" * 200, "not a whole tar file"),
        (header("a.png", 10**12), "the size of a.png cannot be true"),
        (header("a.png", -512) * 2, "the size of a.png cannot be true"),
        (header("a.png", 700) + bytes(600), "the size of a.png cannot be true"),
        (b"\x1f\x8b" + bytes(600), "a packed tar cannot be read at any place; unpack it"),
        (bytes(10240), "no images in 1 tars"),
    ],
)
def test_files_that_are_no_tars_are_named(tmp_path, content, reason):
    (tmp_path / "x.tar").write_bytes(content)
    message = complaint(tar_data(tmp_path / "x.tar"))
    assert message.startswith(f"data.root: {tmp_path / 'x.tar'}: ") and reason in message


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.cls", b"\xff"), ("a.json", b"{"), ("a.json", b"[1]"), ("a.cls", bytes(2**20 + 1))],
)
def test_labels_that_are_none_are_named(tmp_path, name, content):
    write_tar(tmp_path / "x.tar", {"a.png": picture(1), name: content})
    assert f"x.tar: not a whole tar file ({name}: " in complaint(tar_data(tmp_path / "x.tar"))


def test_packed_and_missing_tars_are_named(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.png": picture(1)}, mode="w:gz")
    assert "a packed tar cannot be read" in complaint(tar_data(tmp_path))
    message = complaint(tar_data(tmp_path / "train-{00..11}.tar"))
    assert "no .tar files; give a folder" in message and message.endswith("write * for {…}")


# ----------------------------------------------------------------------------------------- parquet

HUGGING_FACE = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}


def write_parquet(
    path: Path, columns: dict[str, Any], *, group: int = 2, names: Any = None
) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table(columns)
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    parquet.write_table(table, path, row_group_size=2)


def records(*numbers: int) -> list[dict[str, Any]]:
    return [{"bytes": picture(number), "path": f"{number}.png"} for number in numbers]


def parquet_data(root: Path, **data: Any) -> dict[str, Any]:
    return {"name": "parquet", "root": str(root), **data}


@pytest.fixture
def parquet_files(tmp_path: Path) -> Path:
    for name, numbers, values in (
        ("train-0", (0, 1, 2, 3, 4), [0, 1, 1, 0, 1]),
        ("train-1", (5,), [0]),
        ("test-0", (6, 7), [1, 0]),
    ):
        columns = {"image": records(*numbers), "label": values}
        write_parquet(tmp_path / f"{name}.parquet", columns, names=HUGGING_FACE)
    return tmp_path


def test_parquet_files_of_hugging_face(parquet_files):
    held_out = str(parquet_files / "test-*.parquet")
    data = parquet_data(parquet_files / "train-*.parquet", eval_root=held_out)
    train, test = open_evaluation(make_spec(data)) or pytest.fail("there is a held-out split")
    assert train.classes == test.classes == ("cat", "dog")
    assert labels(train) == [0, 1, 1, 0, 1, 0] and labels(test) == [1, 0]
    assert keys(train)[4:] == ["train-0.parquet[4]", "train-1.parquet[0]"]
    for index in (5, 0, 3):
        expected = Image.open(io.BytesIO(picture(index)))
        assert np.array_equal(np.asarray(train.image(index)), np.asarray(expected))
    assert len(split_digest(train)) == 64
    assert "files of several splits" in complaint(parquet_data(parquet_files))


def test_workers_read_parquet_files_alike(parquet_files):
    loaded = []
    for workers in (0, 1):
        data = parquet_data(parquet_files / "train-*.parquet", workers=workers)
        spec = make_spec(data, batch_size=6)
        source = open_train(spec)
        source.image(0)  # what this process keeps does not travel
        with Pipeline(spec, source) as pipeline:
            loaded.append(next(pipeline.batches(0, 1)))
    assert np.array_equal(loaded[0].views[0], loaded[1].views[0])


def test_row_groups_are_kept_up_to_a_limit(parquet_files, monkeypatch):
    from triptych.core.data import parquet as room

    opened: list[str] = []
    before = room._open
    monkeypatch.setattr(room, "_open", lambda path: opened.append(path) or before(path))
    data = parquet_data(parquet_files / "train-*.parquet")
    source = open_train(make_spec(data))
    opened.clear()
    for index in (0, 1, 0, 2, 0):
        source.image(index)
    assert len(opened) == 2  # groups of two images each
    monkeypatch.setattr(room, "CACHED", 1)
    for index in (0, 1, 4, 0):
        source.image(index)
    assert len(opened) == 4
    (note,) = open_splits(make_spec(data), held_out=False).notes()
    assert "each image reads its whole row group, about 2 images" in note


@pytest.mark.parametrize(
    ("columns", "names", "classes", "numbers"),
    [
        ({"img": [picture(0), picture(1)]}, None, (), [-1, -1]),
        ({"image": records(0, 1), "labels": [10, 9]}, None, ("9", "10"), [1, 0]),
        ({"image": records(0, 1), "label": ["b", None]}, None, ("b",), [0, -1]),
        ({"image": records(0, 1), "label": [-1, 1]}, HUGGING_FACE, ("cat", "dog"), [-1, 1]),
    ],
)
def test_columns_of_parquet_files(tmp_path, columns, names, classes, numbers):
    write_parquet(tmp_path / "x.parquet", columns, names=names)
    source: Source = open_train(make_spec(parquet_data(tmp_path)))
    assert source.classes == classes and labels(source) == numbers
    assert source.image(1).mode == "RGB"


@pytest.mark.parametrize(
    ("columns", "data", "reason"),
    [
        ({"picture": records(0)}, {}, "no column image or img with the bytes of images; there are"),
        ({"image": ["a.png"]}, {}, "no column image or img with the bytes"),
        ({"image": records(0), "label": [2]}, {}, "label 2 is none of the 2 classes in the metad"),
        ({"image": records(0), "label": [-2]}, {}, "label -2 is none of the 2 classes"),
        ({"image": records(0), "label": [0.5]}, {}, "neither whole numbers nor texts"),
        (
            {"image": records(0)},
            {"labels": "kind"},
            "no column kind (data.labels); there",
        ),
    ],
)
def test_parquet_files_without_images_or_labels_are_named(tmp_path, columns, data, reason):
    path = tmp_path / "x.parquet"
    write_parquet(path, columns, names=HUGGING_FACE)
    message = complaint(parquet_data(path, **data))
    assert message.startswith(f"data.root: {path}: ") and reason in message


def test_damaged_parquet_files_are_named(parquet_files):
    whole = (parquet_files / "train-0.parquet").read_bytes()
    path = parquet_files / "x.parquet"
    for content in (b"", b"PAR1" + bytes(50), whole[:-30], whole[:-8] + b"\xff\xff\xff\x7fPAR1"):
        path.write_bytes(content)
        assert complaint(parquet_data(path)).startswith(
            f"data.root: {path}: not a whole parquet file ("
        )
    write_parquet(path, {"image": records(0), "label": ["cat"]})
    message = complaint(parquet_data(parquet_files / "[tx]*.parquet"))
    assert "other columns or classes than in" in message


def test_rows_without_an_image_are_damaged(parquet_files):
    path = parquet_files / "x.parquet"
    write_parquet(path, {"image": [{"bytes": None, "path": "a.png"}, *records(0)]})
    source = open_train(make_spec(parquet_data(path)))
    with pytest.raises(DamagedImage, match="holds no bytes of an image"):
        source.image(0)
    whole = path.read_bytes()
    source = pickle.loads(pickle.dumps(source))  # as a worker gets it: without what was read
    path.write_bytes(whole[:4] + bytes(len(whole) - 4))
    with pytest.raises(DamagedImage, match=r"x\.parquet\[1\]: cannot be read"):
        source.image(1)


def test_a_missing_pyarrow_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    assert complaint(parquet_data(tmp_path)).endswith("pip install 'triptych[parquet]' installs it")
