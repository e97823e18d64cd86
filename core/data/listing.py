"""The images of a folder and their classes, remembered between runs."""

import os
from dataclasses import dataclass

import numpy as np
import PIL
from numpy.typing import NDArray

from triptych.core.contracts import State
from triptych.core.data.index import Memory, buffers, strings
from triptych.core.data.scan import ENDINGS, REFUSED, SYSTEM_FOLDERS, Progress, Scan, order, scan
from triptych.core.data.source import Names, packed
from triptych.core.errors import printable

RULES = f"folder 1, Pillow {PIL.__version__}, {sorted(ENDINGS | REFUSED | SYSTEM_FOLDERS)}"
"""What the content of a folder depends on beside its files."""


@dataclass(frozen=True)
class Listing:
    """What is in a folder.

    Attributes:
        names: paths of the images relative to the folder, in the order of ``order``.
        classes: the first-level folders that hold images; empty if an image lies beside them.
        labels: (N,) positions in ``classes``; empty if there are no classes.
        empty: the first-level folders without images, if there are classes.
        others: counts of what was passed over, in one line.
    """

    names: Names
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    empty: tuple[str, ...]
    others: str


def listing(root: str, key: str, memory: Memory | None) -> Listing:
    """The content of a folder; from the index file if there is one, and the folder is as it was.

    Args:
        key: the spec's key that names the folder, for messages.
        memory: where the content is remembered; None: nowhere.

    Raises:
        OSError: a folder cannot be read.
    """
    if memory is None:
        return _listed(scan(root))
    index = memory.index(root, RULES)
    known = index.load(_unpacked)
    if known is not None:
        return known
    scanned = scan(root, Progress(f"{key}: {printable(root)}", memory.say))
    result = _listed(scanned)
    index.save({"others": result.others}, _packed(result), scanned.witnesses, len(result.names))
    return result


def _listed(scanned: Scan) -> Listing:
    names, others = packed(scanned.names), scanned.passed_over()
    none = np.zeros(0, np.int64)
    if not all(os.sep in name for name in scanned.names):
        return Listing(names, (), none, (), others)
    tops = [name.split(os.sep, 1)[0] for name in scanned.names]
    classes = tuple(sorted(set(tops), key=order))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[top] for top in tops], np.int64)
    empty = tuple(sorted(scanned.tops - set(classes), key=order))
    return Listing(names, classes, labels, empty, others)


def _packed(content: Listing) -> State:
    return {
        "labels": content.labels,
        **buffers("names", content.names),
        **buffers("classes", content.classes),
        **buffers("empty", content.empty),
    }


def _unpacked(header: dict[str, str], arrays: State) -> Listing:
    names, classes = strings(arrays, "names"), tuple(strings(arrays, "classes"))
    labels = arrays["labels"]
    if labels.shape != ((len(names),) if classes else (0,)):
        raise ValueError("other labels than names")
    return Listing(names, classes, labels, tuple(strings(arrays, "empty")), header["others"])
