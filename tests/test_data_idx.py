"""IDX files: MNIST, Fashion-MNIST and KMNIST, and the names of their classes."""

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.data_specs import complaint, labels, make_spec

from triptych.core.data import class_names, open_evaluation, open_train
from triptych.core.random import stream

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


def packed(values: np.ndarray, *, kind: int = 8, shape: tuple[int, ...] | None = None) -> bytes:
    """An IDX file; ``shape`` is what its header states."""
    shape = values.shape if shape is None else shape
    return bytes((0, 0, kind, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + bytes(values)


def pixels(count: int, seed: int) -> np.ndarray:
    return stream(seed, "test/idx").integers(0, 256, (count, 7, 5), np.uint8)


def write_idx(folder: Path, ending: str = "", dot: str = "-") -> None:
    """Twelve training and six held-out images of three classes."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate((("train", 12), ("t10k", 6))):
        for kind, values in (
            ("images-idx3", pixels(count, seed)),
            ("labels-idx1", np.arange(count, dtype=np.uint8) % 3),
        ):
            name = f"{split}-{kind.replace('-', dot)}-ubyte{ending}"
            content = packed(values)
            (folder / name).write_bytes(gzip.compress(content) if ending else content)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    write_idx(tmp_path)
    return {"name": "idx", "root": str(tmp_path), "channels": 1}


@pytest.mark.parametrize(
    ("inside", "ending", "dot"), [("", "", "-"), ("", ".gz", "-"), ("raw", "", "."), ("", "", ".")]
)
def test_idx_files_packed_and_unpacked(tmp_path, inside, ending, dot):
    write_idx(tmp_path / inside, ending, dot)
    spec = make_spec({"name": "idx", "root": str(tmp_path), "channels": 1})
    train, test = open_evaluation(spec) or pytest.fail("there is a held-out split")
    assert (len(train), len(test)) == (12, 6)
    assert train.classes == test.classes == ("0", "1", "2")
    assert labels(train) == [0, 1, 2] * 4 and labels(test) == [0, 1, 2] * 2
    assert np.array_equal(np.asarray(test.image(4)), pixels(6, 1)[4])
    assert train.key(7) == "idx/train[7]" and test.name(5) == "idx/t10k[5]"
    assert pickle.loads(pickle.dumps(train)).image(3) == train.image(3)


WHOLE = packed(pixels(12, 0))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (IMAGES, b"", "it begins with nothing"),
        (IMAGES, WHOLE[:9], "it begins with 00 00 08 03"),
        (IMAGES, b"\0\0\x0d" + WHOLE[3:], "it begins with 00 00 0d 03"),
        (IMAGES, packed(np.arange(12, dtype=np.uint8)), "it begins with 00 00 08 01"),
        (IMAGES, WHOLE[:-1], "its header states 420 values, 12 x 7 x 5, and it holds 419"),
        (IMAGES, WHOLE + b"x", "its header states 420 values, 12 x 7 x 5, and it holds more"),
        (IMAGES, packed(pixels(2, 0), shape=(2**32 - 1,) * 3), "more than the file can hold"),
        (
            IMAGES,
            gzip.compress(packed(pixels(2, 0), shape=(2**32 - 1,) * 3), mtime=0),
            "more than the file",
        ),
        (IMAGES, gzip.compress(packed(pixels(2, 0), shape=(3, 7, 5)), mtime=0), "and it holds 70"),
        (IMAGES, gzip.compress(WHOLE, mtime=0)[:-30], "end-of-stream marker"),
        (IMAGES, gzip.compress(WHOLE, mtime=0)[:-8] + bytes(8), "CRC check failed"),
        (IMAGES, gzip.compress(WHOLE, mtime=0)[:12] + b"\xff" * 40, "decompressing"),
        (IMAGES, packed(pixels(0, 0)), "it holds no values: 0 x 7 x 5"),
        (LABELS, WHOLE, "it begins with 00 00 08 03"),
    ],
)
def test_files_that_are_no_idx_files_are_named(data, name, content, reason):
    path = Path(data["root"]) / name
    path.write_bytes(content)
    message = complaint(data)
    kind = "images" if name == IMAGES else "labels"
    assert message.startswith(f"data.root: {path}: not a whole IDX file of {kind} (")
    assert reason in message and message.endswith("download it again")


def test_missing_files_and_files_of_two_downloads_are_named(data):
    root = Path(data["root"])
    (root / LABELS).write_bytes(packed(np.arange(5, dtype=np.uint8)))
    assert complaint(data).startswith(
        f"data.root: {root / LABELS}: 5 labels, but 12 images in {IMAGES}"
    )
    (root / LABELS).write_bytes(packed(np.arange(12, dtype=np.uint8) % 2))
    assert "labels reach 2, those of the training images only 1" in complaint(data, open_evaluation)
    (root / LABELS).unlink()
    assert complaint(data).startswith(f"data.root: {root}: no {LABELS} here, nor {LABELS}.gz;")


def test_root_is_needed_for_idx_files():
    with pytest.raises(Exception, match=r"data\.name idx needs data\.root"):
        make_spec({"name": "idx"})


# ------------------------------------------------------------------------------- names of classes


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("shoe\n\nlong coat\nbag\n", ("shoe", "long coat", "bag")),
        ("2 bag\n0  shoe\n1 long coat\n3 more\n", ("shoe", "long coat", "bag")),
        ("\ufeffé\r\nb\r\nc", ("é", "b", "c")),
    ],
)
def test_class_names_come_by_place_or_by_label(data, tmp_path, text, names):
    path = tmp_path / "names.txt"
    path.write_text(text, encoding="utf-8")
    spec = make_spec({**data, "class_names": str(path)})
    source = open_train(spec)
    assert class_names(spec.data, source.classes) == names
    assert source.classes == ("0", "1", "2")  # what is shown does not change what is learned


def test_without_names_the_labels_are_shown(data):
    assert class_names(make_spec(data).data, ("a", "b")) == ("a", "b")


def test_fashion_mnist_has_a_table(data):
    spec = make_spec({**data, "class_names": "fashion_mnist"})
    names = class_names(spec.data, tuple("0123456789"))
    assert (names[0], names[9]) == ("T-shirt/top", "Ankle boot")
    assert "10 names for 3 classes" in complaint({**data, "class_names": "fashion_mnist"})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a\nb\n", "2 names for 3 classes, and no line for class '0'"),
        (b"0 a\n2 b\n", "2 names for 3 classes, and no line for class '1'"),
        (b"caf\xe9\nb\nc\n", "not a UTF-8 text file"),
        (b"a\0\nb\nc\n", "not a UTF-8 text file"),
        (None, "No such file or directory; give a text file or one of fashion_mnist"),
    ],
)
def test_files_that_do_not_name_the_classes_are_refused(data, tmp_path, content, reason):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    message = complaint({**data, "class_names": str(path)})
    assert message.startswith(f"data.class_names: {path}: {reason}")
