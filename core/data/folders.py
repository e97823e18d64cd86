"""Image folders, with or without one sub-folder per class."""

import os
from collections.abc import Iterator

from triptych.core.data.decode import EXTENSIONS, Decoding
from triptych.core.data.source import Files
from triptych.core.errors import UserError


def folder(root: str, how: Decoding, key: str = "data.root") -> Files:
    """All images below a folder, at any depth, in the order of their paths.

    The first-level sub-folders that hold images are the classes, in the order of their names,
    unless an image lies in the folder itself: then there are no classes. Files are known by their
    extension; hidden ones are passed over; links are followed.

    Args:
        key: the spec's key that names the folder, for messages.

    Raises:
        UserError: not a folder, not readable, or without images.
    """
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        problem = "not a folder" if os.path.exists(root) else "no such folder"
        raise UserError(f"{key}: {root}: {problem}")
    try:
        names = sorted(_images(root, "", ()))
    except OSError as error:
        raise UserError(f"{key}: {error.filename}: {error.strerror}") from error
    if not names:
        raise UserError(f"{key}: {root}: no images in this folder ({', '.join(EXTENSIONS)})")
    if not all(os.sep in name for name in names):
        return Files(root, names, how)
    tops = [name.split(os.sep, 1)[0] for name in names]
    classes = tuple(sorted(set(tops)))
    numbers = {name: number for number, name in enumerate(classes)}
    return Files(root, names, how, [numbers[top] for top in tops], classes)


def _images(root: str, inside: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """Paths relative to ``root``. above: identities of the folders that contain ``inside``."""
    here = os.stat(os.path.join(root, inside))
    identity = (here.st_dev, here.st_ino)
    if identity in above:  # a link to a folder that contains it
        return
    with os.scandir(os.path.join(root, inside)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = os.path.join(inside, entry.name)
            if entry.is_dir():
                yield from _images(root, path, (*above, identity))
            elif entry.name.lower().endswith(EXTENSIONS):
                yield path
