"""Sources: digits, lists and CIFAR-10's files, and what is said about each mistake."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.data_specs import complaint, folder_spec, keys, labels, make_spec, write_images

from triptych.core.data import (
    open_evaluation,
    open_splits,
    open_train,
    require_labels,
    split_digest,
)
from triptych.core.data.cifar import CLASSES, TEST, TRAIN
from triptych.core.data.source import Source
from triptych.core.errors import UserError

# ------------------------------------------------------------------------------------------ digits


def test_digits_keep_their_grey_values_and_their_split():
    from sklearn.datasets import load_digits

    data = load_digits()
    train, test = open_evaluation(make_spec()) or pytest.fail("digits have a held-out split")
    assert (len(train), len(test)) == (1437, 360)
    numbers = [int(name[7:-1]) for name in keys(train) + keys(test)]
    assert sorted(numbers) == list(range(1797))
    for index in (0, 77, 359):
        number = int(test.key(index)[7:-1])
        assert test.label(index) == data.target[number]
        back = np.asarray(test.image(index), np.float64) * 16 / 255
        assert np.abs(back - data.images[number]).max() < 0.05
    whole, held = np.bincount(data.target), np.bincount(labels(test))
    assert np.abs(held - whole / 5).max() < 1
    assert train.name(0) == train.key(0) == f"digits[{numbers[0]}]" and train.classes == tuple(
        "0123456789"
    )
    assert split_digest(test) == "bb57d526185901ac556adc382a09954f3b5be1f653f39b59d8a44e25e3a44e31"


def test_the_digest_of_a_split_tells_images_order_and_labels_apart(tmp_path):
    write_images(tmp_path, ["a/x.png", "b/y.png"])
    first = open_train(folder_spec(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    write_images(elsewhere, ["a/x.png", "b/y.png"])
    assert split_digest(open_train(folder_spec(elsewhere))) == split_digest(
        first
    )  # wherever it lies
    digests = {split_digest(first)}
    write_images(elsewhere, ["b/z.png"])
    digests.add(split_digest(open_train(folder_spec(elsewhere))))
    (elsewhere / "b" / "z.png").rename(elsewhere / "a" / "z.png")
    digests.add(split_digest(open_train(folder_spec(elsewhere))))
    assert len(digests) == 3


# ------------------------------------------------------------------------------------------- lists


def listed(folder: Path, text: str | bytes, name: str = "list.csv", **data: Any) -> Source:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_train(make_spec({"name": "image_list", "list": str(path), **data}))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_images(tmp_path, ["a.png", "my photo 1.png", "x, y.png", "sub/d.png"])
    return tmp_path


@pytest.mark.parametrize(
    ("text", "names", "classes", "numbers"),
    [
        ("a.png\nsub/d.png\n", ["a.png", "sub/d.png"], (), [-1, -1]),
        ("a.png,cat\r\nsub/d.png,ant\r\n", ["a.png", "sub/d.png"], ("ant", "cat"), [1, 0]),
        ("path,label\na.png,10\nsub/d.png,9", ["a.png", "sub/d.png"], ("9", "10"), [1, 0]),
        (
            "label,width,path\n1,3,a.png\n,3,sub/d.png\n",
            ["a.png", "sub/d.png"],
            ("1",),
            [0, -1],
        ),
        ('a.png 3\nmy photo 1.png\n"my photo 1.png" 0\n', None, ("0", "3"), [1, -1, 0]),
        ('"x, y.png"\n\n  "a.png" , "a cat"\n', ["x, y.png", "a.png"], ("a cat",), [-1, 0]),
        ("\ufeffa.png\t7\n", ["a.png"], ("7",), [0]),
    ],
)
def test_lists(photos, text, names, classes, numbers):
    source = listed(photos, text)
    assert keys(source) == (names or ["a.png", "my photo 1.png", "my photo 1.png"])
    assert source.classes == classes and labels(source) == numbers
    assert all(source.image(index).mode == "RGB" for index in range(len(source)))


def test_a_list_names_any_file(photos):
    names = [b"caf\xe9.png", b"line\nbreak.png", b" spaces .png "]
    for name in names:
        os.link(photos / "a.png", photos / os.fsdecode(name))
    source = listed(photos, b"".join(b'"%s",caf\xe9\n' % name for name in names))
    assert [os.fsencode(key) for key in keys(source)] == names
    assert [os.fsencode(name) for name in source.classes] == [b"caf\xe9"]
    assert len(split_digest(source)) == 64


def test_paths_of_a_list_are_relative_to_root(photos):
    source = listed(photos, f"d.png\n{photos / 'a.png'}\n", root=str(photos / "sub"))
    assert [source.name(index) for index in (0, 1)] == [
        str(photos / "sub" / "d.png"),
        str(photos / "a.png"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a.png\nb.png\n", "list.csv:2: no such file"),
        ("a.png,1\nx, y.png,2\n", "list.csv:2: 3 columns"),
        ("path,label\n,3\n", "list.csv:2: no path"),
        ("", "no images in this list"),
        ("path,label\n", "no images in this list"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", "not a CSV or UTF-8 text file"),
        ('a.png\n"sub/d.png\na.png\n', "list.csv:3: a quote is not closed"),
        (
            b"a.png\ncaf\xe9.png\n",
            r"list.csv:2: no such file: .*caf\\udce9.png' \(this line is not",
        ),
        ("a.png".encode("utf-16"), r"not a CSV or UTF-8 text file \(it holds zero bytes\)"),
        ("sub\n", "list.csv:1: no such file"),
    ],
)
def test_mistakes_in_a_list_are_named(photos, text, reason):
    with pytest.raises(UserError, match=reason) as caught:
        listed(photos, text)
    assert str(caught.value).startswith(f"data.list: {photos / 'list.csv'}")
    assert "\n" not in str(caught.value)


def test_a_list_that_is_not_there(tmp_path):
    message = complaint({"name": "image_list", "list": str(tmp_path / "none.csv")})
    assert message == f"data.list: {tmp_path / 'none.csv'}: No such file or directory"


def lists(folder: Path, train: str, held_out: str, **data: Any) -> dict[str, Any]:
    """The data section of two lists."""
    (folder / "train.csv").write_text(train)
    (folder / "val.csv").write_text(held_out)
    paths = {"list": str(folder / "train.csv"), "eval_list": str(folder / "val.csv")}
    return {"name": "image_list", **paths, **data}


def test_a_held_out_list_takes_the_classes_of_the_training_list(photos):
    data = lists(photos, "a.png,cat\nsub/d.png,ant\nmy photo 1.png,bee\n", "a.png,cat\n")
    bank, queries = open_evaluation(make_spec(data)) or pytest.fail("there is a held-out list")
    assert labels(bank) == [2, 0, 1] and labels(queries) == [2]
    assert queries.classes == bank.classes == ("ant", "bee", "cat")
    assert list(open_splits(make_spec(data)).notes()) == [
        f"data.eval_list: {photos / 'val.csv'}: no images of 2 of the 3 classes: 'ant', 'bee'"
    ]
    inside = lists(photos, "d.png,cat\n", "d.png,cat\n", root=str(photos / "sub"))
    assert len(open_evaluation(make_spec(inside)) or ()) == 2


@pytest.mark.parametrize(
    ("train", "held_out", "reason"),
    [
        (
            "a.png,cat\n",
            "a.png,dog\n",
            "data.eval_list: {}/val.csv: class 'dog' is not among the 1 classes of the training "
            "images ('cat')",
        ),
        ("a.png,cat\n", "b.png,cat\n", "data.eval_list: {}/val.csv:1: no such file"),
        ("a.png\n", "a.png,cat\n", "class 'cat' is not among the 0 classes"),
        (
            "a.png,cat\nsub/d.png\n",
            "a.png,cat\n",
            "data.name: image_list: 1 of 2 images have no label (the first is {}/sub/d.png), and "
            "an evaluation needs labels; give each line of the list a label",
        ),
        ("a.png\n", "sub/d.png\n", "1 of 1 images have no label (the first is {}/a.png)"),
    ],
)
def test_lists_that_cannot_be_evaluated_are_named(photos, train, held_out, reason):
    message = complaint(lists(photos, train, held_out), open_evaluation)
    assert reason.format(photos) in message


def test_labels_are_required_in_one_line(photos):
    spec = folder_spec(photos)
    with pytest.raises(UserError) as caught:
        require_labels(spec.data, open_train(spec), "method linear")
    assert str(caught.value) == (
        f"data.name: image_folder: 4 of 4 images have no label (the first is {photos / 'a.png'}), "
        "and method linear needs labels; sort the images into one folder per class"
    )
    require_labels(make_spec().data, open_train(make_spec()), "method linear")


# ------------------------------------------------------------------------------------------- CIFAR


def cifar_rows(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 3072), np.uint8), rng.integers(0, 10, count).tolist()


def write_cifar(folder: Path, binary: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(TRAIN + TEST):
        rows, numbers = cifar_rows(4, number)
        if binary:
            column = np.array(numbers, np.uint8)[:, None]
            (folder / f"{name}.bin").write_bytes(np.hstack([column, rows]).tobytes())
        else:
            content = {b"batch_label": b"x", b"labels": numbers, b"data": rows, b"filenames": []}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar_in_both_versions(tmp_path, binary, inside):
    kind = "bin" if binary else "py"
    write_cifar(tmp_path / f"cifar-10-batches-{kind}" if inside else tmp_path, binary)
    spec = make_spec({"name": "cifar10", "root": str(tmp_path)})
    train, test = open_evaluation(spec) or pytest.fail("CIFAR-10 has a held-out split")
    assert (len(train), len(test)) == (20, 4) and train.classes == CLASSES
    rows, numbers = cifar_rows(4, 2)
    assert labels(train)[8:12] == numbers
    assert np.array_equal(np.asarray(train.image(9)).transpose(2, 0, 1).ravel(), rows[1])
    assert train.name(9) == "cifar10/train[9]"
    assert keys(open_train(spec)) == keys(train)


# As Python 2 wrote the published files: strings are bytes, and the array is a string of them.
PYTHON_2 = (
    b"(dp0\nS'data'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\n"
    b"S'b'\np5\ntp6\nRp7\n(I1\n(I2\nI3072\ntp8\ncnumpy\ndtype\np9\n(S'u1'\np10\nI0\nI1\ntp11\n"
    b"Rp12\n(I3\nS'|'\np13\nNNNI-1\nI-1\nI0\ntp14\nbI00\nS'" + b"ab" * 3072 + b"'\np15\ntp16\nb"
    b"sS'labels'\np17\n(lp18\nI6\naI9\nas."
)


def test_cifar_as_python_2_wrote_it(tmp_path):
    write_cifar(tmp_path, binary=False)
    (tmp_path / "data_batch_1").write_bytes(PYTHON_2)
    source = open_train(make_spec({"name": "cifar10", "root": str(tmp_path)}))
    assert len(source) == 18 and labels(source)[:2] == [6, 9]
    assert np.asarray(source.image(0))[0, :2, 0].tolist() == [ord("a"), ord("b")]


class Hostile:
    """Would create a file if it were unpickled in good faith."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    write_cifar(tmp_path, binary=False)
    trap = tmp_path / "trap"
    for content in (
        Hostile(trap),
        {b"data": Hostile(trap), b"labels": [1]},
        {b"data": np.array([Hostile(trap)], object), b"labels": [1]},
    ):
        (tmp_path / "data_batch_3").write_bytes(pickle.dumps(content, protocol=2))
        message = complaint({"name": "cifar10", "root": str(tmp_path)})
        assert str(tmp_path / "data_batch_3") in message and "refused" in message
        assert not trap.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        pickle.dumps([1, 2], protocol=2),
        pickle.dumps({b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 100), np.uint8), b"labels": [1, 1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.float32), b"labels": [1]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, protocol=2),
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": ["a"]}, protocol=2),
        PYTHON_2[:-2000],
        PYTHON_2.replace(b"I3072", b"I3073"),
        PYTHON_2.replace(b"'u1'", b"'O8'"),
    ],
)
def test_other_files_are_not_cifar(tmp_path, content):
    write_cifar(tmp_path, binary=False)
    (tmp_path / "data_batch_2").write_bytes(content)
    message = complaint({"name": "cifar10", "root": str(tmp_path)})
    assert message.startswith(f"data.root: {tmp_path / 'data_batch_2'}: not a CIFAR-10 file")


def test_missing_and_cut_cifar_files_are_named(tmp_path):
    data = {"name": "cifar10", "root": str(tmp_path)}
    assert "cifar-10-python.tar.gz" in complaint(data)
    write_cifar(tmp_path, binary=True)
    (tmp_path / "test_batch.bin").unlink()
    assert complaint(data, open_evaluation) == (
        f"data.root: {tmp_path / 'test_batch.bin'}: No such file or directory"
    )
    cut = tmp_path / "data_batch_5.bin"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert complaint(data).startswith(f"data.root: {cut}: not a CIFAR-10 file")
