"""Opens the source of images that a spec names."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from triptych.core.config.spec import DataSpec, RunSpec
from triptych.core.data import cifar, folders, idx, lists, pets
from triptych.core.data.classes import matched, require_labels
from triptych.core.data.decode import Decoding, decoding
from triptych.core.data.digits import digits
from triptych.core.data.flowers import flowers102
from triptych.core.data.index import Memory
from triptych.core.data.names import class_names
from triptych.core.data.parquet import parquet
from triptych.core.data.picks import draw
from triptych.core.data.source import Labelled, Source
from triptych.core.data.stl import Stl
from triptych.core.data.subset import Subset
from triptych.core.data.tars import tars
from triptych.core.errors import UserError, printable
from triptych.core.files.writing import Say


class Splits(NamedTuple):
    """The images of a spec. If both splits have labels, they share the list of classes.

    Attributes:
        held_out: None if the spec has no held-out images, or if they were not asked for.
        labelled: the labelled images beside the held-out ones, if ``train`` has others.
    """

    train: Source
    held_out: Source | None
    labelled: Source | None = None

    @property
    def bank(self) -> Source:
        """The labelled images that an evaluation learns from."""
        return self.train if self.labelled is None else self.labelled

    def notes(self) -> Iterator[str]:
        """Lines for the user about the files, e.g. about those that were passed over."""
        for split in self:
            if isinstance(split, Labelled):
                yield from split.notes


class Wanted(NamedTuple):
    """What is to be opened, and how.

    Attributes:
        held_out: whether held-out images are wanted.
        say: gets lines about work that takes long.
    """

    held_out: bool
    say: Say

    def memory(self, data: DataSpec) -> Memory | None:
        """Where the content of large folders and tars is remembered."""
        return None if data.index is None else Memory(data.index, self.say)


Opener = Callable[[DataSpec, Decoding, Wanted], Splits]
"""(section ``data``, decoding, what is wanted) -> splits."""


def _digits(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    return Splits(*digits(how))


def _cifar10(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    root = _required(data.root, "data.root")
    test = cifar.cifar10(root, how, train=False) if wanted.held_out else None
    return Splits(cifar.cifar10(root, how, train=True), test)


def _cifar100(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    root, labels = _required(data.root, "data.root"), data.labels or "fine"
    test = cifar.cifar100(root, labels, how, train=False) if wanted.held_out else None
    return Splits(cifar.cifar100(root, labels, how, train=True), test)


def _flowers102(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    root = _required(data.root, "data.root")
    test = flowers102(root, how, train=False) if wanted.held_out else None
    return Splits(flowers102(root, how, train=True), test)


def _idx(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    root = _required(data.root, "data.root")
    train = idx.idx(root, how, train=True)
    return Splits(train, idx.held_out(root, how, train) if wanted.held_out else None)


def _image_folder(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    memory = wanted.memory(data)
    train = folders.folder(_required(data.root, "data.root"), how, memory=memory)
    if not wanted.held_out or data.eval_root is None:
        return Splits(train, None)
    return Splits(train, folders.held_out(train, data.eval_root, how, memory))


def _image_list(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    train = lists.image_list(_required(data.list, "data.list"), data.root, how)
    if not wanted.held_out or data.eval_list is None:
        return Splits(train, None)
    return Splits(train, lists.held_out(train, data.eval_list, data.root, how))


def _parquet(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    train = parquet(_required(data.root, "data.root"), data.labels, how, "data.root")
    if not wanted.held_out or data.eval_root is None:
        return Splits(train, None)
    queries = parquet(data.eval_root, data.labels, how, "data.eval_root")
    return Splits(train, matched(train, queries, f"data.eval_root: {printable(data.eval_root)}"))


def _pets(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    root = _required(data.root, "data.root")
    train = pets.pets(root, how, train=True)
    return Splits(train, pets.held_out(root, how, train) if wanted.held_out else None)


def _stl10(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    root = _required(data.root, "data.root")
    train = Stl(root, data.split.split("+"), how)
    if not wanted.held_out:
        return Splits(train, None)
    labelled = None if data.split == "train" else Stl(root, ["train"], how)
    return Splits(train, Stl(root, ["test"], how), labelled)


def _webdataset(data: DataSpec, how: Decoding, wanted: Wanted) -> Splits:
    memory = wanted.memory(data)
    train = tars(_required(data.root, "data.root"), how, "data.root", memory)
    if not wanted.held_out or data.eval_root is None:
        return Splits(train, None)
    queries = tars(data.eval_root, how, "data.eval_root", memory)
    return Splits(train, matched(train, queries, f"data.eval_root: {printable(data.eval_root)}"))


SOURCES: dict[str, Opener] = {
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "digits": _digits,
    "flowers102": _flowers102,
    "idx": _idx,
    "image_folder": _image_folder,
    "image_list": _image_list,
    "parquet": _parquet,
    "pets": _pets,
    "stl10": _stl10,
    "webdataset": _webdataset,
}
"""``data.name`` -> function that opens the source."""


def _ignored(line: str) -> None:
    """Takes a line that nobody wants."""


def open_splits(spec: RunSpec, *, held_out: bool = True, say: Say = _ignored) -> Splits:
    """The training split and, where ``held_out`` asks for it, the held-out split.

    Args:
        say: gets lines about work that takes long, e.g. when a large folder is read.

    Raises:
        UserError: the data are missing, empty or malformed, or the labels of the two do not fit.
    """
    splits = SOURCES[spec.data.name](spec.data, decoding(spec.data), Wanted(held_out, say))
    if splits.held_out is not None:
        for split in (splits.bank, splits.held_out):
            require_labels(spec.data, split, "an evaluation")
    class_names(spec.data, splits.train.classes)  # a mistake in the names is told at the start
    amount = spec.data.labelled
    return splits if amount is None else _with_few_labels(spec, splits, amount)


def _with_few_labels(spec: RunSpec, splits: Splits, amount: int | str) -> Splits:
    """The splits with the images that ``data.labelled`` draws as their bank."""
    bank, key = splits.bank, "data.labelled"
    require_labels(spec.data, bank, key)
    labels = np.array([bank.label(index) for index in range(len(bank))], np.int64)
    of = "data: the training split"
    few = Subset(bank, draw(amount, spec.seed, labels, bank.classes, key=key, of=of))
    if spec.method.labelled:
        return splits._replace(train=few, labelled=None)
    return splits._replace(labelled=few)


def open_train(spec: RunSpec) -> Source:
    """The training split; its labels serve evaluation only.

    Raises:
        UserError: the data are missing, empty or malformed.
    """
    return open_splits(spec, held_out=False).train


def open_evaluation(spec: RunSpec) -> tuple[Source, Source] | None:
    """A labelled bank and labelled queries (the held-out split).

    Returns:
        None if the spec names no held-out split. That is so for an image folder without
        ``data.eval_root`` and for a list without ``data.eval_list``.

    Raises:
        UserError: the data are missing, empty or malformed, or the labels of the two do not fit.
    """
    splits = open_splits(spec)
    return None if splits.held_out is None else (splits.bank, splits.held_out)


def _required(value: str | None, key: str) -> str:
    if value is None:
        raise UserError(f"{key}: missing")
    return value
