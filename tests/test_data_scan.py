"""Which files of a folder are images; all others are counted."""

import os
from pathlib import Path
from typing import get_args

from PIL import Image
from support.data_specs import complaint, folder_spec, keys, write_images

from triptych.core.config.spec import DataSpec
from triptych.core.data import (
    open_splits,
    open_train,
    scan,
)
from triptych.core.data.open import SOURCES
from triptych.core.evaluation.split import Split

# ----------------------------------------------------------------------- what counts as an image


def test_whatever_pillow_reads_is_an_image(tmp_path):
    """By its ending in upper or lower case, or by its first bytes."""
    names = [f"{number:02}{ending}" for number, ending in enumerate(sorted(scan.ENDINGS - ENCODED))]
    write_images(tmp_path, names)
    write_images(tmp_path, ["x.jpg", "y.png", "z.tif"])
    for old, new in (("x.jpg", "X.JPG"), ("y.png", "no ending"), ("z.tif", "scan.dat")):
        (tmp_path / old).rename(tmp_path / new)
    source = open_train(folder_spec(tmp_path))
    assert keys(source) == sorted([*names, "X.JPG", "no ending", "scan.dat"])
    assert all(source.image(index).mode == "RGB" for index in range(len(source)))
    assert list(open_splits(folder_spec(tmp_path)).notes()) == []


ENCODED = {".avifs", ".pfm"}
"""Endings that Pillow does not write, or not from RGB."""


def test_every_ending_belongs_to_a_format_of_pillow():
    Image.init()
    formats = Image.registered_extensions()
    assert {ending for ending in scan.ENDINGS if formats.get(ending) not in Image.OPEN} == {".mpo"}
    assert set(scan.FORMATS) <= set(Image.OPEN) and not scan.ENDINGS & scan.REFUSED


def test_rare_formats_are_known_by_their_first_bytes(tmp_path):
    image = Image.new("1", (32, 32))
    for number, kind in enumerate(("MSP", "XBM", "PCX", "ICO")):
        image.save(tmp_path / f"{number}.old", kind, sizes=[(32, 32)], bitmap_format="bmp")
    icon = (tmp_path / "3.old").read_bytes()
    (tmp_path / "4.old").write_bytes(icon[:2] + b"\2" + icon[3:])  # a cursor
    card = b"".join(f"{text:80}".encode() for text in ("SIMPLE  =                    T", "END"))
    (tmp_path / "5.txt").write_bytes(card)  # begins like FITS, and describes no image
    source = open_train(folder_spec(tmp_path))
    assert keys(source) == [f"{number}.old" for number in range(5)]
    assert all(source.image(index).size for index in range(5))


def test_the_first_picture_of_a_gif_is_taken(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    image = open_train(folder_spec(tmp_path)).image(0)
    assert image.getpixel((3, 3)) == (255, 0, 0)


def test_what_is_passed_over_is_counted_by_ending(tmp_path):
    write_images(tmp_path, ["cat/1.png", "cat/raw.tif"])
    (tmp_path / "cat" / "raw.tif").rename(tmp_path / "cat" / "raw.NEF")  # begins like a TIFF
    others = ("a.txt", "b.TXT", "cat/c.txt", "Thumbs.db", "LICENSE", "frame.0001", "cat/.DS_Store")
    for name in (*others, ".hidden.png", "download.part"):
        (tmp_path / name).write_bytes(b"BM this is no picture")
    os.mkfifo(tmp_path / "pipe")
    (note,) = open_splits(folder_spec(tmp_path)).notes()
    assert note == (
        f"data.root: {tmp_path}: passed over: 3 .txt, 2 hidden, 2 without ending, 1 .db, 1 .nef, "
        "1 .part, 1 not a file"
    )
    (tmp_path / "cat" / "1.png").unlink()
    message = complaint({"name": "image_folder", "root": str(tmp_path)})
    assert message.startswith(f"data.root: {tmp_path}: no images in this folder; passed over: 3 .t")


def test_folders_of_servers_and_systems_are_no_classes(tmp_path):
    system = ("@eaDir", "__MACOSX", "lost+found", "#recycle", "$RECYCLE.BIN", ".ipynb_checkpoints")
    system += ("Temporary Items", "~snapshot")
    inside = [f"{name}/1.png" for name in system] + ["cat/@eaDir/1.png/thumb.jpg", "cat/._1.jpg"]
    write_images(tmp_path, ["cat/1.jpg", "dog/1.jpg", *inside])
    (tmp_path / "lost+found").chmod(0)
    source = open_train(folder_spec(tmp_path))
    assert source.classes == ("cat", "dog") and keys(source) == ["cat/1.jpg", "dog/1.jpg"]
    (note,) = open_splits(folder_spec(tmp_path)).notes()
    assert note.endswith(
        "passed over: 2 @eaDir, 2 hidden, 1 #recycle, 1 $RECYCLE.BIN, 1 Temporary Items, "
        "1 __MACOSX, 1 lost+found, 1 ~snapshot"
    )


def test_few_files_are_opened(tmp_path, monkeypatch):
    """None whose ending says all; of another ending, no more once enough were no images."""
    write_images(tmp_path, ["1.png", "2.JPEG", "x.png"])
    (tmp_path / "x.png").rename(tmp_path / "x.data")
    for name in "abcdef":
        (tmp_path / f"{name}.xml").write_text("<size/>")
    opened = []
    monkeypatch.setattr(scan, "ENOUGH", 3)
    real = scan._is_image
    monkeypatch.setattr(scan, "_is_image", lambda path: opened.append(path) or real(path))
    assert keys(open_train(folder_spec(tmp_path))) == ["1.png", "2.JPEG", "x.data"]
    assert [os.path.basename(path) for path in opened] == ["a.xml", "b.xml", "c.xml", "x.data"]


def test_a_run_scans_each_folder_once(tmp_path, monkeypatch):
    write_images(tmp_path, ["train/a/1.png", "train/b/2.png", "val/b/1.png"])
    spec = folder_spec(tmp_path / "train", eval_root=str(tmp_path / "val"))
    scanned, real = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(Path(path)) or real(path))
    split = Split(spec, open_splits(spec))
    assert (len(split.bank), len(split.queries)) == (2, 1)
    folders = [tmp_path / name for name in ("train", "train/a", "train/b", "val", "val/b")]
    assert sorted(scanned) == folders


def test_each_data_set_of_a_spec_has_one_entry():
    assert set(SOURCES) == set(get_args(DataSpec.model_fields["name"].annotation))
