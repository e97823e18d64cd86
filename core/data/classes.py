"""Checks the labels of a source, and the classes of two splits against each other."""

from collections.abc import Iterable

from triptych.core.config.spec import DataSpec
from triptych.core.data.scan import order
from triptych.core.data.source import L, Labelled, Source
from triptych.core.errors import UserError, printable

SHOWN, LONGEST = 3, 100
"""Most names in one message, and most characters shown of a name."""

REMEDIES = {
    "image_folder": "sort the images into one folder per class",
    "image_list": "give each line of the list a label",
    "parquet": "name the column of the labels in data.labels",
    "stl10": "set data.split: train",
    "webdataset": "give each image a .cls file in its tar",
}
"""``data.name`` -> how its images get labels."""


def require_labels(data: DataSpec, source: Source, need: str) -> None:
    """Checks that every image of a source has a label.

    Args:
        need: what needs the labels, e.g. "method linear".

    Raises:
        UserError: names the first image without a label.
    """
    without = [index for index in range(len(source)) if source.label(index) < 0]
    if source.classes and not without:
        return
    count = len(without) if source.classes else len(source)
    first = printable(source.name(without[0] if without else 0))
    raise UserError(
        f"data.name: {data.name}: {count} of {len(source)} images have no label (the first is "
        f"{first}), and {need} needs labels; {REMEDIES.get(data.name, 'take other data')}"
    )


def label_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """The labels that occur, sorted: by value if all are numbers, else as names. "" is no label."""
    names = set(labels) - {""}
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names, key=order))


def matched(bank: Labelled, queries: L, where: str) -> L:
    """Held-out images with the classes of the training images ``bank``.

    Args:
        where: the spec's key and path of the held-out images, for messages.

    Raises:
        UserError: a held-out class is none of the training classes.
    """
    known = set(bank.classes)
    unknown = [name for name in queries.classes if name not in known]
    if unknown:
        raise UserError(
            f"{where}: class {quoted(unknown)} is not among the {len(bank.classes)} classes of the "
            f"training images ({quoted(bank.classes)}); name it as there, or leave its images out"
        )
    return queries.relabelled(bank.classes, absent(bank, queries, where))


def absent(bank: Labelled, queries: Labelled, where: str) -> list[str]:
    """A line about the training classes that no held-out image has; empty if there are none."""
    present = set(queries.classes)
    names = [name for name in bank.classes if name not in present]
    if not names:
        return []
    return [
        f"{where}: no images of {len(names)} of the {len(bank.classes)} classes: {quoted(names)}"
    ]


def quoted(names: Iterable[str]) -> str:
    """The first few names, and the number of further ones. The end of a long name is left out."""
    listed = [f"'{_shortened(printable(name))}'" for name in names]
    more = len(listed) - SHOWN
    return ", ".join(listed[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
