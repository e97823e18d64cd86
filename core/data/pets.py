"""Reads Oxford-IIIT Pets from its published files: a folder of images and lists of names."""

import os
from collections.abc import Iterator

from triptych.core.data.decode import Decoding
from triptych.core.data.source import Files, native_path
from triptych.core.errors import UserError, printable

LISTS = {True: "trainval.txt", False: "test.txt"}
"""Whether to train -> the list in the folder ``annotations``."""
CLASSES = 37
MAX_BYTES = 2**24
"""Most bytes read of a list; the published ones have about 100 000."""


def pets(root: str, how: Decoding, *, train: bool) -> Files:
    """3680 images for training or 3669 held-out ones, in 37 breeds of cats and dogs.

    The classes are the breeds in their published order, with the names that the files begin with.

    Args:
        root: the folder that holds ``images`` and ``annotations``.

    Raises:
        UserError: files are missing or malformed.
    """
    folder = native_path(root)
    path = os.path.join(folder, "annotations", LISTS[train])
    breeds: dict[int, str] = {}
    names, labels = list[str](), list[int]()
    for at, name, number in _entries(path):
        breed = name.rpartition("_")[0] or name
        if breeds.setdefault(number, breed) != breed:
            raise UserError(
                f"{at}: class {number} is '{printable(breed)}' here and "
                f"'{printable(breeds[number])}' before"
            )
        names.append(os.path.join("images", f"{name}.jpg"))
        labels.append(number - 1)
    classes = tuple(breeds.get(number, str(number)) for number in range(1, CLASSES + 1))
    _check_present(folder, names, path)
    return Files(folder, names, how, labels, classes)


def held_out(root: str, how: Decoding, bank: Files) -> Files:
    """The held-out images with the classes of the training images ``bank``.

    Raises:
        UserError: as in ``pets``, or the two lists name different breeds.
    """
    queries = pets(root, how, train=False)
    for number, (here, there) in enumerate(zip(queries.classes, bank.classes, strict=True), 1):
        if here != there:
            raise UserError(
                f"data.root: {printable(queries.root)}: class {number} is '{printable(here)}' in "
                f"{LISTS[False]} and '{printable(there)}' in {LISTS[True]}; take both from one "
                "annotations.tar.gz"
            )
    return queries


def _entries(path: str) -> Iterator[tuple[str, str, int]]:
    """(place for messages, name of the image, number of the class from 1) of each line."""
    at = f"data.root: {printable(path)}"
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES).decode()
    except OSError as error:
        raise UserError(f"{at}: {error.strerror}; unpack annotations.tar.gz here") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{at}: not a text file") from error
    lines = [(line, text.split()) for line, text in enumerate(text.splitlines(), 1)]
    entries = [(line, words) for line, words in lines if words and not words[0].startswith("#")]
    if not entries:
        raise UserError(f"{at}: no images in this list")
    for line, words in entries:
        number = words[1] if len(words) > 1 else ""
        if not (number.isdecimal() and 1 <= int(number) <= CLASSES) or os.sep in words[0]:
            raise UserError(
                f"{at}:{line}: expected NAME CLASS with a class from 1 to {CLASSES}, found "
                f"'{printable(' '.join(words[:2]))}'"
            )
        yield f"{at}:{line}", words[0], int(number)


def _check_present(folder: str, names: list[str], path: str) -> None:
    try:
        present = frozenset(os.listdir(os.path.join(folder, "images")))
    except OSError as error:
        where = printable(os.path.join(folder, "images"))
        raise UserError(
            f"data.root: {where}: {error.strerror}; unpack images.tar.gz here"
        ) from error
    for name in names:
        if os.path.basename(name) not in present:
            raise UserError(
                f"data.root: {printable(os.path.join(folder, name))}: no such file, but "
                f"{os.path.basename(path)} names it; unpack images.tar.gz here"
            )
