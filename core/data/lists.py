"""Image lists: a CSV or text file with one path, and maybe a label, per line."""

import csv
import os
from collections.abc import Iterator

from triptych.core.data.decode import Decoding
from triptych.core.data.source import UNLABELLED, Files
from triptych.core.errors import UserError


def image_list(path: str, root: str | None, how: Decoding) -> Files:
    """The images of a list, in its order.

    The file is UTF-8. With a header line that has a column ``path``, the columns ``path`` and
    ``label`` are taken and others passed over. Without one, a line is ``path``, ``path,label`` or
    ``path label``. A path that holds a comma stands in double quotes, as in any CSV; spaces need
    none. Labels are names, or numbers throughout; in order, they are the classes.

    Args:
        root: folder that paths are relative to; default: the folder of the list.

    Raises:
        UserError: the list, or a file in it (with its line), is missing or malformed.
    """
    path = os.path.expanduser(path)
    root = os.path.dirname(path) if root is None else os.path.expanduser(root)
    entries = [_located(path, line, root, name, label) for line, name, label in _entries(path)]
    if not entries:
        raise UserError(f"data.list: {path}: no images in this list")
    names, labels = zip(*entries, strict=True)
    classes = _classes(labels)
    numbers = {"": UNLABELLED, **{name: number for number, name in enumerate(classes)}}
    return Files(root, names, how, [numbers[label] for label in labels], classes)


def _entries(path: str) -> Iterator[tuple[int, str, str]]:
    """Line number, path and label ("" for none) of each line."""
    header: list[str] | None = None
    for line, cells in _rows(path):
        if header is None:
            header = [cell.lower() for cell in cells]
            if "path" in header:
                continue
            header = ["path", "label"]
        if len(cells) > len(header):
            raise UserError(
                f"data.list: {path}:{line}: {len(cells)} columns, expected {', '.join(header)}; "
                "put a path that holds a comma in double quotes, or name the columns in line 1"
            )
        row = dict(zip(header, cells, strict=False))
        if not row.get("path"):
            raise UserError(f"data.list: {path}:{line}: no path in this line")
        yield line, row["path"], row.get("label", "")


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each line that is not blank."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            for cells in reader:
                if any("\n" in cell for cell in cells):
                    raise UserError(f"data.list: {path}:{reader.line_num}: a quote is not closed")
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, [cell.strip() for cell in cells]
    except OSError as error:
        raise UserError(f"data.list: {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"data.list: {path}: not a CSV or UTF-8 text file ({error})") from error


def _located(path: str, line: int, root: str, name: str, label: str) -> tuple[str, str]:
    """A path that exists, and its label; tells ``my photo.jpg`` from ``photo.jpg 3``."""
    if os.path.isfile(os.path.join(root, name)):
        return name, label
    parts = name.rsplit(maxsplit=1)
    if not label and len(parts) == 2 and os.path.isfile(os.path.join(root, parts[0])):
        return parts[0], parts[1]
    raise UserError(f"data.list: {path}:{line}: no such file: {os.path.join(root, name)!r}")


def _classes(labels: tuple[str, ...]) -> tuple[str, ...]:
    """The labels that occur, numbers in the order of their values."""
    found = {label for label in labels if label}
    if all(label.isdecimal() for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))
