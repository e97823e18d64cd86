"""Image folders, with or without one sub-folder per class."""

import os
from unicodedata import normalize

from triptych.core.data.classes import absent, quoted
from triptych.core.data.decode import Decoding
from triptych.core.data.index import Memory
from triptych.core.data.listing import listing
from triptych.core.data.scan import order
from triptych.core.data.source import Files, native_path
from triptych.core.errors import UserError, printable


def folder(root: str, how: Decoding, key: str = "data.root", memory: Memory | None = None) -> Files:
    """All images below a folder, at any depth, in the order of their paths; see ``scan``.

    The classes are the first-level sub-folders that hold images, in the order of their names. If
    an image lies in the folder itself, there are no classes.

    Args:
        key: the spec's key that names the folder, for messages.
        memory: where the content of large folders is remembered; None: nowhere.

    Raises:
        UserError: the folder is missing, cannot be read, or has no images.
    """
    root = native_path(root)
    if not os.path.isdir(root):
        problem = "not a folder" if os.path.exists(root) else "no such folder"
        raise UserError(f"{key}: {printable(root)}: {problem}")
    try:
        content = listing(root, key, memory)
    except OSError as error:
        raise UserError(f"{key}: {printable(str(error.filename))}: {error.strerror}") from error
    at, others = f"{key}: {printable(root)}", content.others
    if not content.names:
        passed = f"; passed over: {others}" if others else ""
        raise UserError(f"{at}: no images in this folder{passed}")
    notes = [f"{at}: passed over: {others}"] if others else []
    if content.empty:
        notes.append(
            f"{at}: no images in {len(content.empty)} of the class folders, which are no classes: "
            f"{quoted(content.empty)}"
        )
    labels = content.labels if content.classes else None
    return Files(root, content.names, how, labels, content.classes, notes)


def held_out(bank: Files, root: str, how: Decoding, memory: Memory | None = None) -> Files:
    """A folder of held-out images with the classes of the training folder ``bank``.

    Raises:
        UserError: as in ``folder``, or one of the two has no classes, or their classes do not fit.
    """
    queries = folder(root, how, "data.eval_root", memory)
    for key, split in (("data.root", bank), ("data.eval_root", queries)):
        _check_classes(key, split)
    unknown = [name for name in queries.classes if name not in set(bank.classes)]
    if unknown:
        raise UserError(
            f"data.eval_root: {printable(queries.root)}: class {quoted(unknown)} is not among the "
            f"{len(bank.classes)} class folders of data.root ({quoted(bank.classes)})"
            + _explained(unknown[0], bank)
        )
    where = f"data.eval_root: {printable(queries.root)}"
    return queries.relabelled(bank.classes, absent(bank, queries, where))


def _check_classes(key: str, split: Files) -> None:
    """Raises UserError if the folders of a split give no labels, or probably the wrong ones."""
    root = printable(split.root)
    if len(split.classes) > 1:
        return
    names = [split.key(index) for index in range(len(split))]
    if split.classes:
        inner = {name.split(os.sep, 2)[1] for name in names if name.count(os.sep) > 1}
        if len(inner) > 1 and all(n.count(os.sep) > 1 for n in names):
            only = printable(split.classes[0])
            raise UserError(
                f"{key}: {root}: one class folder, {quoted(split.classes)}, holds all others "
                f"({quoted(sorted(inner, key=order))}); to have those as classes, give "
                f"{key}: {os.path.join(root, only)}"
            )
        return
    stray = [name for name in names if os.sep not in name]
    tops = sorted({name.split(os.sep, 1)[0] for name in names if os.sep in name}, key=order)
    if not tops:
        raise UserError(
            f"{key}: {root}: no class folders, so there are no labels to evaluate with; sort the "
            "images into one folder per class, or leave data.eval_root out"
        )
    lies, it = ("lies", "it") if len(stray) == 1 else ("lie", "them")
    raise UserError(
        f"{key}: {root}: {quoted(stray)} {lies} beside the class folders {quoted(tops)}, so "
        f"there are no labels to evaluate with; move {it} into a class folder or away, or leave "
        "data.eval_root out"
    )


def _explained(name: str, bank: Files) -> str:
    """A reason why a class is none of ``bank``, or what to do."""
    if os.path.isdir(os.path.join(bank.root, name)):
        return f"; its folder in {printable(bank.root)} holds no images"
    like = [other for other in bank.classes if _looks(other) == _looks(name)]
    if like:
        return f"; {like[0]!a} is another name than {name!a}"
    return "; name its folder as there, or give images of it for training"


def _looks(name: str) -> str:
    """A form of a name that is equal for names which look the same."""
    return normalize("NFKC", name).casefold()
