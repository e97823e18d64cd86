"""Image folders: classes, what is said about each mistake, and names of any kind."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.data_specs import complaint, folder_spec, keys, labels, write_images

from triptych.core.data import (
    DamagedImage,
    Pipeline,
    open_evaluation,
    open_splits,
    open_train,
    split_digest,
)
from triptych.core.data.decode import Decoding, decode
from triptych.core.errors import printable

# ----------------------------------------------------------------------------------------- folders


def test_class_folders_give_labels(tmp_path):
    write_images(tmp_path, ["dog/2.JPG", "dog/deep/1.png", "cat/x y.jpeg", "ant/a.webp"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no class")
    source = open_train(folder_spec(tmp_path))
    assert keys(source) == ["ant/a.webp", "cat/x y.jpeg", "dog/2.JPG", "dog/deep/1.png"]
    assert source.classes == ("ant", "cat", "dog") and labels(source) == [0, 1, 2, 2]
    assert source.name(1) == str(tmp_path / "cat" / "x y.jpeg")
    assert source.image(1).mode == "RGB"


def test_an_image_beside_the_folders_means_no_classes(tmp_path):
    write_images(tmp_path, ["b.png", "a/c.png", "é.png"])
    source = open_train(folder_spec(tmp_path))
    assert keys(source) == ["a/c.png", "b.png", "é.png"]
    assert source.classes == () and labels(source) == [-1, -1, -1]
    assert open_evaluation(folder_spec(tmp_path)) is None


def test_hidden_files_are_passed_over_and_links_followed_once(tmp_path):
    root = tmp_path / "root"
    write_images(tmp_path, ["root/a/1.png", "else/2.png"])
    for hidden in ("._1.png", ".cache"):
        (root / hidden).write_bytes(b"")
    (root / "b").symlink_to(tmp_path / "else")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = open_train(folder_spec(root))
    assert keys(source) == ["a/1.png", "a/gone.png", "b/2.png"]
    with pytest.raises(DamagedImage, match=r"gone\.png"):  # named, not lost
        source.image(1)


def test_folders_that_cannot_serve_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, reason in (("empty", "no images"), ("file", "not a folder"), ("x", "no such folder")):
        path = str(tmp_path / name)
        assert complaint({"name": "image_folder", "root": path}).startswith(
            f"data.root: {path}: {reason}"
        )


def test_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path, ["pictures/1.png"])
    assert len(open_train(folder_spec("~/pictures"))) == 1


def test_held_out_folder_takes_the_classes_of_the_training_folder(tmp_path):
    write_images(tmp_path, ["train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/1.png"])
    spec = folder_spec(tmp_path / "train", eval_root=str(tmp_path / "val"))
    bank, queries = open_evaluation(spec) or pytest.fail("there is a held-out split")
    assert labels(bank) == [0, 1, 2] and labels(queries) == [2]
    assert queries.classes == bank.classes
    data = {"name": "image_folder", "root": str(tmp_path / "train")}
    write_images(tmp_path, ["other/x/1.png", "flat/1.png"])
    other = complaint({**data, "eval_root": str(tmp_path / "other")}, open_evaluation)
    assert other.startswith("data.eval_root") and "'x'" in other
    flat = complaint({**data, "eval_root": str(tmp_path / "flat")}, open_evaluation)
    assert flat.startswith("data.eval_root") and "no class folders" in flat


# -------------------------------------------------------- class folders that do not give labels


def held_out_complaint(tmp_path: Path, *names: str) -> str:
    """What is said about ``train`` and ``val``, made of these pictures."""
    write_images(tmp_path, list(names))
    data = {"name": "image_folder", "root": str(tmp_path / "train")}
    return complaint({**data, "eval_root": str(tmp_path / "val")}, open_evaluation)


@pytest.mark.parametrize(("split", "key"), [("train", "root"), ("val", "eval_root")])
def test_a_picture_beside_the_class_folders_is_named(tmp_path, split, key):
    pictures = ("train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png")
    message = held_out_complaint(tmp_path, *pictures, f"{split}/preview.jpg")
    assert message.startswith(
        f"data.{key}: {tmp_path / split}: 'preview.jpg' lies beside the class folders 'cat', 'dog'"
    )
    more = [f"{split}/{number}.png" for number in range(4)]
    assert "'0.png', '1.png', '2.png' and 2 more lie beside" in held_out_complaint(tmp_path, *more)


def test_class_folders_one_level_too_deep_are_named(tmp_path):
    inner = [f"{split}/all/{kind}/1.png" for split in ("train", "val") for kind in ("cat", "dog")]
    message = held_out_complaint(tmp_path, *inner)
    assert "one class folder, 'all', holds all others ('cat', 'dog')" in message
    assert message.endswith(f"give data.root: {tmp_path / 'train' / 'all'}")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fox", "class 'fox' is not among the 2 class folders of data.root ('cat', 'dog')"),
        ("empty", "its folder in {train} holds no images"),
        ("Cat", "'cat' is another name than 'Cat'"),
        ("DOG", "'dog' is another name than 'DOG'"),
    ],
)
def test_a_held_out_class_that_is_no_training_class_is_named(tmp_path, name, reason):
    (tmp_path / "train" / "empty").mkdir(parents=True)
    message = held_out_complaint(
        tmp_path, "train/cat/1.png", "train/dog/2.png", f"val/{name}/1.png"
    )
    assert message.startswith("data.eval_root") and f"'{name}'" in message
    assert reason.format(train=tmp_path / "train") in message


def test_names_that_only_look_the_same_are_told_apart(tmp_path):
    composed, combining = "caf\xe9", "cafe\u0301"
    message = held_out_complaint(
        tmp_path, f"train/{composed}/1.png", "train/x/1.png", f"val/{combining}/1.png"
    )
    assert r"'caf\xe9' is another name than 'cafe\u0301'" in message


def test_training_classes_without_held_out_images_are_told(tmp_path):
    write_images(tmp_path, ["train/a/1.png", "train/b/2.png", "train/c/3.png", "val/b/1.png"])
    spec = folder_spec(tmp_path / "train", eval_root=str(tmp_path / "val"))
    assert list(open_splits(spec).notes()) == [
        f"data.eval_root: {tmp_path / 'val'}: no images of 2 of the 3 classes: 'a', 'c'"
    ]


def test_class_folders_without_images_are_told(tmp_path):
    write_images(tmp_path, ["cat/1.png", "dog/deep/2.png"])
    for name in ("empty", "hollow/deep", "dog/empty", ".hidden", "lost+found"):
        (tmp_path / name).mkdir(parents=True)
    splits = open_splits(folder_spec(tmp_path))
    assert splits.train.classes == ("cat", "dog")
    assert list(splits.notes())[1:] == [
        f"data.root: {tmp_path}: no images in 2 of the class folders, which are no classes: "
        "'empty', 'hollow'"
    ]


# ------------------------------------------------------------------------------------------ names

ODD = [
    b"caf\xe9",
    b"line\nbreak",
    b"\x1b[31mred",
    b"tab\tbell\x07",
    "日本".encode(),
    "\u202etxt".encode(),
    b"\xff" * 200,
]
"""Bytes of names that a file system takes."""


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Classes and files with such names."""
    for number, name in enumerate(ODD):
        folder = tmp_path / "train" / os.fsdecode(name)
        write_images(folder, [f"{number}.png"])
        (folder / f"{number}.png").rename(folder / os.fsdecode(name + b".png"))
    return tmp_path / "train"


def test_any_name_of_the_file_system_works(odd):
    source = open_train(folder_spec(odd))
    assert {os.fsencode(name) for name in source.classes} == set(ODD)
    assert split_digest(source) == split_digest(open_train(folder_spec(odd)))
    for index in range(len(source)):
        assert source.image(index).mode == "RGB"
        assert printable(source.name(index)).isprintable()


def test_any_name_can_be_said(odd):
    for path in odd.glob("*/*"):
        path.write_bytes(b"no picture")
        with pytest.raises(DamagedImage) as caught:
            decode(str(path), Decoding("RGB"))
        assert str(caught.value).isprintable()
    write_images(odd.parent, [f"val/{os.fsdecode(name)}x/1.png" for name in ODD])
    data = {"name": "image_folder", "root": str(odd), "eval_root": str(odd.parent / "val")}
    assert complaint(data, open_evaluation).isprintable()
    for folder in odd.iterdir():
        (folder / os.fsdecode(folder.name.encode(errors="surrogateescape") + b".png")).unlink()
        assert complaint({"name": "image_folder", "root": str(folder)}).isprintable()


def test_workers_know_every_name(odd):
    loaded = []
    for workers in (0, 1):
        spec = folder_spec(odd, workers=workers)
        with Pipeline(spec, open_train(spec)) as pipeline:
            loaded.append(next(pipeline.batches(0, 1)))
    assert np.array_equal(loaded[0].views[0], loaded[1].views[0])


def test_the_locale_changes_neither_order_nor_digest(odd):
    root = odd.rename(odd.with_name("日本"))  # as a spec has it: text, not bytes
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from support.data_specs import folder_spec\n"
        "from triptych.core.data import open_train, split_digest\n"
        f"source = open_train(folder_spec({str(root)!a}))\n"
        "print(sys.getfilesystemencoding(), split_digest(source))"
    )
    found = []
    for environment in (
        {"LC_ALL": "C.UTF-8"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(done.stdout.split())
    (first, digest), (second, other) = found
    assert first != second and digest == other


def test_the_digest_of_a_folder_is_the_one_it_has_always_been(tmp_path):
    write_images(tmp_path, ["a/1.png", "b/é.jpg", "b/日本.png"])
    assert split_digest(open_train(folder_spec(tmp_path))) == (
        "83baab67779a8b436167aeac0085e05f19be7f363846584c323bcd60fe671937"
    )
