"""CIFAR-100, STL-10, Oxford Flowers and Pets from small files of their published forms."""

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.data_specs import complaint, keys, labels, make_spec, write_images

from triptych.core.data import (
    DamagedImage,
    Pipeline,
    Source,
    class_names,
    open_evaluation,
    open_splits,
    open_train,
)
from triptych.core.random import stream


def both(data: dict[str, Any]) -> tuple[Source, Source]:
    return open_evaluation(make_spec(data)) or pytest.fail("there is a held-out split")


# --------------------------------------------------------------------------------------- CIFAR-100

NAMES = {
    kind: [f"{kind} {n}" for n in range(count)] for kind, count in (("coarse", 20), ("fine", 100))
}


def hundred(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of pixels, and rows of a coarse and a fine label."""
    rng = stream(seed, "test/cifar100")
    numbers = np.stack([rng.integers(0, 20, 4), rng.integers(0, 100, 4)], axis=1).astype(np.uint8)
    return rng.integers(0, 256, (4, 3072), np.uint8), numbers


def write_hundred(folder: Path, binary: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, part in enumerate(("train", "test")):
        rows, numbers = hundred(seed)
        if binary:
            (folder / f"{part}.bin").write_bytes(np.hstack([numbers, rows]).tobytes())
            continue
        content = {b"data": rows, b"coarse_labels": numbers[:, 0].tolist()}
        content[b"fine_labels"] = numbers[:, 1].tolist()
        (folder / part).write_bytes(pickle.dumps(content, protocol=2))
    for kind, names in NAMES.items():
        if binary:
            (folder / f"{kind}_label_names.txt").write_text("\n".join(names) + "\n\n")
    meta = {f"{kind}_label_names".encode(): [n.encode() for n in NAMES[kind]] for kind in NAMES}
    if not binary:
        (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("kind", ["fine", "coarse"])
def test_cifar_100_in_both_versions_with_both_labels(tmp_path, binary, kind):
    write_hundred(tmp_path / f"cifar-100-{'binary' if binary else 'python'}", binary)
    train, test = both({"name": "cifar100", "root": str(tmp_path), "labels": kind})
    rows, numbers = hundred(1)
    assert train.classes == test.classes == tuple(NAMES[kind])
    assert labels(test) == numbers[:, int(kind == "fine")].tolist()
    assert np.array_equal(np.asarray(test.image(2)).transpose(2, 0, 1).ravel(), rows[2])
    assert train.key(3) == "cifar100/train[3]"


def test_the_fine_labels_of_cifar_100_are_the_default(tmp_path):
    write_hundred(tmp_path, binary=True)
    assert len(open_train(make_spec({"name": "cifar100", "root": str(tmp_path)})).classes) == 100


def test_files_that_are_not_of_cifar_100_are_named(tmp_path):
    data = {"name": "cifar100", "root": str(tmp_path)}
    assert "unpack cifar-100-python.tar.gz or cifar-100-binary.tar.gz" in complaint(data)
    write_hundred(tmp_path, binary=True)
    rows, numbers = hundred(0)
    (tmp_path / "train.bin").write_bytes(np.hstack([numbers + 100, rows]).tobytes())
    start = f"data.root: {tmp_path / 'train.bin'}: not a CIFAR-100 file ("
    assert complaint(data) == f"{start}its labels do not fit)"
    (tmp_path / "train.bin").write_bytes(rows.tobytes())
    assert complaint(data).startswith(f"{start}12288 bytes are not whole rows of 3074")
    names = tmp_path / "fine_label_names.txt"
    names.write_text("apple\n")
    assert complaint(data).endswith("not a CIFAR-100 file (1 names, expected 100)")
    names.unlink()
    assert complaint(data) == f"data.root: {names}: No such file or directory"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"name": "cifar100", "root": "x", "labels": "both"}, "expected fine or coarse"),
        ({"name": "cifar10", "root": "x", "labels": "fine"}, "cifar10 has no choice of labels"),
        ({"name": "pets", "root": "x", "split": "unlabeled"}, "only stl10 has such a part"),
        ({"name": "flowers102"}, "data.name flowers102 needs data.root"),
    ],
)
def test_keys_of_another_data_set_are_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        make_spec(data)


# ------------------------------------------------------------------------------------------ STL-10

STL = {"train": 3, "test": 2, "unlabeled": 4}


def stl_planes(part: str) -> np.ndarray:
    """Pixels as they are stored: image, colour, column, row."""
    return stream(0, f"test/stl/{part}").integers(0, 256, (STL[part], 3, 96, 96), np.uint8)


@pytest.fixture
def stl(tmp_path: Path) -> Path:
    for part, count in STL.items():
        (tmp_path / f"{part}_X.bin").write_bytes(stl_planes(part).tobytes())
        if part != "unlabeled":
            (tmp_path / f"{part}_y.bin").write_bytes(bytes(10 - n for n in range(count)))
    return tmp_path


def test_stl_10_is_read_column_by_column(stl):
    train, test = both({"name": "stl10", "root": str(stl)})
    assert labels(train) == [9, 8, 7] and labels(test) == [9, 8]
    assert train.classes[9] == "truck" and test.name(1) == "stl10/test[1]"
    pixels = np.asarray(test.image(1))
    assert pixels.shape == (96, 96, 3)
    assert pixels[5, 70, 2] == stl_planes("test")[1, 2, 70, 5]  # row 5, column 70, blue


def test_the_unlabeled_part_of_stl_10_is_for_training_alone(stl):
    (stl / "stl10_binary").mkdir()
    for file in stl.glob("*.bin"):
        file.rename(stl / "stl10_binary" / file.name)
    data = {"name": "stl10", "root": str(stl), "split": "train+unlabeled"}
    splits = open_splits(make_spec(data))
    assert keys(splits.train) == [
        *(f"stl10/train[{n}]" for n in range(3)),
        *(f"stl10/unlabeled[{n}]" for n in range(4)),
    ]
    assert labels(splits.train) == [9, 8, 7, -1, -1, -1, -1]
    assert labels(splits.bank) == [9, 8, 7]  # an evaluation learns from labelled images
    first = np.asarray(splits.train.image(3)).transpose(2, 1, 0)
    assert np.array_equal(first, stl_planes("unlabeled")[0])
    only = open_splits(make_spec({**data, "split": "unlabeled"}))
    assert len(only.train) == 4 and len(only.bank) == 3


def test_workers_read_stl_10_alike(stl):
    loaded = []
    for workers in (0, 1):
        spec = make_spec({"name": "stl10", "root": str(stl), "workers": workers}, batch_size=3)
        with Pipeline(spec, open_train(spec)) as pipeline:
            loaded.append(next(pipeline.batches(0, 1)))
    assert np.array_equal(loaded[0].views[0], loaded[1].views[0])


def test_files_that_are_not_of_stl_10_are_named(stl):
    data = {"name": "stl10", "root": str(stl)}
    (stl / "train_y.bin").write_bytes(b"\1\2\x0b")
    message = complaint(data)
    assert message.startswith(f"data.root: {stl / 'train_y.bin'}: expected 3 labels from 1 to 10")
    (stl / "train_y.bin").write_bytes(b"\1\2\3\4")
    assert complaint(data) == message
    source = open_train(make_spec({**data, "split": "unlabeled"}))
    (stl / "unlabeled_X.bin").write_bytes(b"x" * 27648)
    with pytest.raises(DamagedImage, match="shorter than at the start"):
        source.image(3)
    (stl / "train_X.bin").write_bytes(b"x" * 27649)
    assert "27649 bytes are not whole images of 27648" in complaint(data)
    (stl / "train_X.bin").unlink()
    assert complaint(data).startswith(f"data.root: {stl}: no train_X.bin here; unpack stl10_binary")


# ----------------------------------------------------------------------------------------- Flowers


def write_flowers(folder: Path, **variables: Any) -> None:
    """Nine images, of which numbers 4, 1 and 9 are for training."""
    from scipy.io import savemat

    write_images(folder / "jpg", [f"image_{number:05}.jpg" for number in range(1, 10)])
    numbers = {"labels": np.arange(102, 93, -1, dtype=np.uint8)[None], **variables}
    savemat(folder / "imagelabels.mat", {"labels": numbers["labels"]}, do_compression=True)
    parts: dict[str, Any] = {"trnid": [[4, 1]], "valid": [[9]], "tstid": [[2, 3]], **variables}
    savemat(folder / "setid.mat", {name: parts[name] for name in ("trnid", "valid", "tstid")})


def test_flowers_from_their_matlab_files(tmp_path):
    write_flowers(tmp_path)
    data = {"name": "flowers102", "root": str(tmp_path)}
    train, test = both(data)
    assert keys(train) == ["jpg/image_00001.jpg", "jpg/image_00004.jpg", "jpg/image_00009.jpg"]
    assert labels(train) == [101, 98, 93] and labels(test) == [100, 99]
    assert len(train.classes) == 102 and train.classes[101] == "102"
    assert train.image(2).mode == "RGB"
    names = tmp_path / "names.txt"
    names.write_text("".join(f"flower {n}\n" for n in range(1, 103)))
    spec = make_spec({**data, "class_names": str(names)})
    assert class_names(spec.data, train.classes)[101] == "flower 102"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"labels": [[0] * 9]}, "imagelabels.mat: labels: expected whole numbers from 1 to 102"),
        ({"labels": [[103] * 9]}, "imagelabels.mat: labels: expected whole numbers from 1 to 102"),
        ({"labels": [[1.5] * 9]}, "imagelabels.mat: labels: expected whole numbers"),
        ({"labels": "text"}, "imagelabels.mat: labels: expected numbers"),
        ({"trnid": [[10]]}, "setid.mat: trnid: expected whole numbers from 1 to 9"),
        ({"valid": np.zeros((0, 0))}, "setid.mat: valid: expected numbers"),
    ],
)
def test_numbers_that_do_not_fit_the_flowers_are_named(tmp_path, variables, reason):
    write_flowers(tmp_path, **variables)
    message = complaint({"name": "flowers102", "root": str(tmp_path)})
    assert message.startswith(f"data.root: {tmp_path}/{reason}")


def test_damaged_and_missing_files_of_the_flowers_are_named(tmp_path):
    data = {"name": "flowers102", "root": str(tmp_path)}
    assert "put imagelabels.mat and setid.mat beside" in complaint(data)
    write_flowers(tmp_path)
    (tmp_path / "jpg" / "image_00009.jpg").unlink()
    assert "image_00009.jpg: no such file, but setid.mat names it" in complaint(data)
    path = tmp_path / "imagelabels.mat"
    whole = path.read_bytes()
    lying = whole[:132] + struct.pack("<I", 2**31) + whole[136:]
    for content in (b"", b"x" * 300, whole[:150], whole[:-20], lying, bytes(2**20 + 1)):
        path.write_bytes(content)
        message = complaint(data)
        assert message.startswith(f"data.root: {path}: not imagelabels.mat of Oxford Flowers-102 (")


# -------------------------------------------------------------------------------------------- Pets

TRAINVAL = """#Image CLASS-ID SPECIES BREED ID
Abyssinian_10 1 1 1
american_bulldog_7 2 2 1

Abyssinian_2 1 1 1
"""


@pytest.fixture
def pet_folder(tmp_path: Path) -> Path:
    write_images(
        tmp_path / "images",
        [f"{n}.jpg" for n in ("Abyssinian_10", "american_bulldog_7", "Abyssinian_2")],
    )
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "trainval.txt").write_text(TRAINVAL)
    (tmp_path / "annotations" / "test.txt").write_text(
        "american_bulldog_7 2 2 1\nAbyssinian_2 1 1 1\n"
    )
    return tmp_path


def test_pets_from_their_lists(pet_folder):
    train, test = both({"name": "pets", "root": str(pet_folder)})
    assert keys(train)[:2] == ["images/Abyssinian_10.jpg", "images/american_bulldog_7.jpg"]
    assert labels(train) == [0, 1, 0] and labels(test) == [1, 0]
    assert train.classes[:2] == ("Abyssinian", "american_bulldog") and len(train.classes) == 37
    assert train.image(0).mode == "RGB"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Abyssinian_10 38 1 1\n", "trainval.txt:1: expected NAME CLASS with a class from 1 to 37"),
        ("Abyssinian_10 0\n", "trainval.txt:1: expected NAME CLASS"),
        ("#\nAbyssinian_10\n", "trainval.txt:2: expected NAME CLASS"),
        ("../Abyssinian_10 1\n", "trainval.txt:1: expected NAME CLASS"),
        ("Abyssinian_10 1\nBengal_1 1\n", "trainval.txt:2: class 1 is 'Bengal' here and 'Abyss"),
        ("Abyssinian_99 1 1 1\n", "trainval.txt names it; unpack images.tar.gz here"),
        ("", "trainval.txt: no images in this list"),
        ("\xe9", "trainval.txt: not a text file"),
    ],
)
def test_mistakes_in_the_lists_of_the_pets_are_named(pet_folder, text, reason):
    path = pet_folder / "annotations" / "trainval.txt"
    path.write_bytes(text.encode("latin-1"))
    assert reason in complaint({"name": "pets", "root": str(pet_folder)})


def test_missing_files_and_lists_of_two_downloads_are_named(pet_folder):
    data = {"name": "pets", "root": str(pet_folder)}
    lists = pet_folder / "annotations"
    (lists / "test.txt").write_text("Bengal_7 1\n")
    (pet_folder / "images" / "Bengal_7.jpg").write_bytes(b"")
    message = complaint(data, open_evaluation)
    assert "class 1 is 'Bengal' in test.txt and 'Abyssinian' in trainval.txt" in message
    (lists / "trainval.txt").unlink()
    assert complaint(data) == (
        f"data.root: {lists / 'trainval.txt'}: No such file or directory; unpack "
        "annotations.tar.gz here"
    )
