"""Image lists: a CSV or text file with one path, and maybe a label, per line."""

import csv
import os
from collections.abc import Iterator

from triptych.core.data.classes import label_classes, matched
from triptych.core.data.decode import Decoding
from triptych.core.data.source import UNLABELLED, Files, local_name, native_path
from triptych.core.errors import UserError, printable


def image_list(path: str, root: str | None, how: Decoding, key: str = "data.list") -> Files:
    """The images of a list, in its order.

    - Encoding: UTF-8. Other bytes stand for themselves, as in names of files.
    - Header: a first line with a column ``path``. Only its columns ``path`` and ``label`` are read.
    - Lines without a header: ``path``, ``path,label`` or ``path label``.
    - Quotes: a path with a comma or a line break stands in double quotes, as in any CSV. Spaces
      need no quotes.
    - Labels: all numbers, or names. The sorted labels are the classes.

    Args:
        root: folder that paths are relative to; None: the folder of the list.
        key: the spec's key that names the list, for messages.

    Raises:
        UserError: the list is missing or malformed, or a file in it is missing (names the line).
    """
    path = native_path(path)
    root = os.path.dirname(path) if root is None else native_path(root)
    entries = [_located(at, root, name, label) for at, name, label in _entries(path, key)]
    if not entries:
        raise UserError(f"{key}: {printable(path)}: no images in this list")
    names, labels = zip(*entries, strict=True)
    classes = label_classes(labels)
    numbers = {"": UNLABELLED, **{name: number for number, name in enumerate(classes)}}
    return Files(root, names, how, [numbers[label] for label in labels], classes)


def held_out(bank: Files, path: str, root: str | None, how: Decoding) -> Files:
    """The images of a held-out list with the classes of the training list ``bank``.

    Raises:
        UserError: as in ``image_list``, or a label is none of the training list's.
    """
    queries = image_list(path, root, how, "data.eval_list")
    return matched(bank, queries, f"data.eval_list: {printable(native_path(path))}")


def _entries(path: str, key: str) -> Iterator[tuple[str, str, str]]:
    """(place for messages, path, label) of each line; the label is "" if there is none."""
    header: list[str] | None = None
    for line, cells in _rows(path, key):
        at = f"{key}: {printable(path)}:{line}"
        if header is None:
            header = [cell.strip().lower() for cell in cells]
            if "path" in header:
                continue
            header = ["path", "label"]
        if len(cells) > len(header):
            raise UserError(
                f"{at}: {len(cells)} columns, expected {printable(', '.join(header))}; "
                "put a path that holds a comma in double quotes, or name the columns in line 1"
            )
        row = dict(zip(header, cells, strict=False))
        if not row.get("path", "").strip():
            raise UserError(f"{at}: no path in this line")
        yield at, row["path"], row.get("label", "").strip()


def _rows(path: str, key: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each line that is not blank."""
    try:
        with open(path, "rb") as binary:
            if b"\0" in binary.read(4096):
                raise csv.Error("it holds zero bytes")
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, [local_name(cell) for cell in cells]
    except OSError as error:
        raise UserError(f"{key}: {printable(path)}: {error.strerror}") from error
    except csv.Error as error:
        raise UserError(
            f"{key}: {printable(path)}: not a CSV or UTF-8 text file ({error})"
        ) from error


def _located(at: str, root: str, name: str, label: str) -> tuple[str, str]:
    """A path that exists, and its label. Existence tells ``my photo.jpg`` from ``photo.jpg 3``."""
    for candidate in (name, name.strip()):
        if os.path.isfile(os.path.join(root, candidate)):
            return candidate, label
    if "\n" in name:
        raise UserError(f"{at}: a quote is not closed")
    parts = name.rsplit(maxsplit=1)
    if not label and len(parts) == 2 and os.path.isfile(os.path.join(root, parts[0])):
        return parts[0], parts[1]
    hint = "" if _is_utf8(name) else " (this line is not UTF-8, and no file has these bytes)"
    raise UserError(f"{at}: no such file: '{printable(os.path.join(root, name.strip()))}'{hint}")


def _is_utf8(name: str) -> bool:
    try:
        os.fsencode(name).decode()
    except UnicodeDecodeError:
        return False
    return True
