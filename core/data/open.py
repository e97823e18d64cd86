"""The choice of a source by the spec."""

from triptych.core.config.spec import RunSpec
from triptych.core.data.cifar import cifar10
from triptych.core.data.decode import decoding
from triptych.core.data.digits import digits
from triptych.core.data.folders import folder
from triptych.core.data.lists import image_list
from triptych.core.data.source import Files, Source
from triptych.core.errors import UserError


def open_train(spec: RunSpec) -> Source:
    """The training split; its labels serve evaluation only.

    Raises:
        UserError: the data are missing, empty or malformed.
    """
    data, how = spec.data, decoding(spec.data)
    if data.name == "digits":
        return digits(how)[0]
    if data.name == "image_list":
        return image_list(_given(data.list, "data.list"), data.root, how)
    root = _given(data.root, "data.root")
    if data.name == "cifar10":
        return cifar10(root, how, train=True)
    return folder(root, how)


def open_evaluation(spec: RunSpec, train: Source | None = None) -> tuple[Source, Source] | None:
    """A labelled bank (the training split) and labelled queries (the held-out split).

    Args:
        train: what ``open_train`` gave, where it was called: a large folder is not scanned again.

    Returns:
        None where the spec names no held-out split: an image folder without ``data.eval_root``,
        and every image list.

    Raises:
        UserError: the data are missing, empty or malformed, or the labels of the two do not fit.
    """
    data, how = spec.data, decoding(spec.data)
    if data.name == "digits":
        return digits(how)
    if data.name == "cifar10":
        root = _given(data.root, "data.root")
        return cifar10(root, how, train=True), cifar10(root, how, train=False)
    if data.name == "image_folder" and data.eval_root is not None:
        bank = train if isinstance(train, Files) else folder(_given(data.root, "data.root"), how)
        return bank, _queries(bank, folder(data.eval_root, how, "data.eval_root"))
    return None


def _queries(bank: Files, queries: Files) -> Files:
    """The held-out images with the numbers that the bank gives to the classes."""
    for key, split in (("data.root", bank), ("data.eval_root", queries)):
        if not split.classes:
            raise UserError(
                f"{key}: {split.root}: no class folders, so there are no labels to evaluate with; "
                "sort the images into one folder per class, or leave data.eval_root out"
            )
    unknown = set(queries.classes) - set(bank.classes)
    if unknown:
        raise UserError(
            f"data.eval_root: {queries.root}: class {min(unknown)!r} is not among the "
            f"{len(bank.classes)} class folders of data.root"
        )
    return queries.relabelled(bank.classes)


def _given(value: str | None, key: str) -> str:
    if value is None:
        raise UserError(f"{key}: missing")
    return value
