"""What tars and parquet files share: which files a key of the spec names, and the two splits."""

import glob
import os
import re
from collections import defaultdict

from triptych.core.data.scan import order
from triptych.core.data.source import native_path
from triptych.core.errors import UserError, printable

SPLIT = re.compile(r"(train|validation|valid|val|test)(?![a-z])", re.IGNORECASE)
"""How the name of a file begins that holds one of several splits."""


def shards(root: str, ending: str, key: str) -> list[str]:
    """The paths of the files that ``root`` names, sorted.

    Args:
        root: a folder, whose files with this ending are meant, or a pattern with ``*``, or a file.
        ending: with its dot.
        key: the spec's key that gives ``root``, for messages.

    Raises:
        UserError: there is no such file, or a folder holds the files of several splits.
    """
    path = native_path(root)
    at = f"{key}: {printable(path)}"
    if os.path.isdir(path):
        try:
            names = [name for name in os.listdir(path) if name.lower().endswith(ending)]
        except OSError as error:
            raise UserError(f"{at}: {error.strerror}") from error
        _check_one_split(at, names, path)
        paths = [os.path.join(path, name) for name in names if not name.startswith(".")]
    else:
        paths = [path] if os.path.isfile(path) else glob.glob(path)
    if not paths:
        hint = "; write * for {…}" if "{" in path else ""
        raise UserError(
            f"{at}: no {ending} files; give a folder, a file, or a pattern such as "
            f"DIR/train-*{ending}{hint}"
        )
    return sorted(paths, key=order)


def _check_one_split(at: str, names: list[str], folder: str) -> None:
    """Held-out images in the training data would be worse than an error."""
    splits = defaultdict(list)
    for name in names:
        match = SPLIT.match(name)
        splits[match[1].lower() if match else ""].append(name)
    if len(splits) > 1:
        first = [sorted(files)[0] for _, files in sorted(splits.items())]
        example = os.path.join(printable(folder), "train-*" + os.path.splitext(names[0])[1])
        raise UserError(
            f"{at}: files of several splits ({', '.join(map(printable, first))}); name those of "
            f"one, e.g. {example}"
        )
