"""Which images of the bank are labelled in a low-shot evaluation."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from triptych.core.config.lowshot import LowshotSpec
from triptych.core.contracts import Array
from triptych.core.data.classes import quoted
from triptych.core.data.picks import draw, require_all
from triptych.core.data.source import local_name, native_path
from triptych.core.errors import UserError, printable
from triptych.core.evaluation.split import Catalogue


@dataclass(frozen=True)
class Shots:
    """The labelled images of one split.

    Attributes:
        label: number of images per class, or their share as a text, e.g. "1%".
        origin: the seed that drew the images, or the file that names them.
        index: (n,) int64, ascending positions in the bank.
    """

    label: int | str
    origin: int | str
    index: Array

    def digest(self, catalogue: Catalogue) -> str:
        """SHA-256 of the names and labels of the images; the first 16 hexadecimal digits."""
        digest = hashlib.sha256()
        for position in self.index:
            name = catalogue.name(int(position)).encode("utf-8", "surrogateescape")
            digest.update(name + f"\0{catalogue.labels[position]}\0".encode())
        return digest.hexdigest()[:16]


def splits(settings: LowshotSpec, catalogue: Catalogue) -> dict[int | str, list[Shots]]:
    """The splits of each number of labelled images: of each file, or of each seed.

    Raises:
        UserError: a class has too few images, or a file is missing or does not fit the bank.
    """
    made: Iterable[Shots]
    if settings.files:
        made = [listed(path, catalogue) for path in settings.files]
    else:
        made = [drawn(s, seed, catalogue) for s in settings.shots for seed in settings.seeds]
    grouped: dict[int | str, list[Shots]] = defaultdict(list)
    for shots in made:
        grouped[shots.label].append(shots)
    return dict(grouped)


def drawn(label: int | str, seed: int, catalogue: Catalogue) -> Shots:
    """Images of each class, drawn with a seed; see ``core.data.picks.draw``.

    Raises:
        UserError: a class has fewer images.
    """
    at, images = "evaluate.lowshot", "the training split"
    index = draw(
        *(label, seed, catalogue.labels, catalogue.classes),
        key=f"{at}.shots",
        of=f"{at}: {images}",
    )
    return Shots(label, seed, index)


def listed(path: str, catalogue: Catalogue) -> Shots:
    """The images that a text file names, one in each line.

    A line holds an image's path inside the data folder, or its file name alone. Of several images
    with this file name the one is meant whose class is the part before the first underscore, as in
    ``n01440764_10026.JPEG``.

    Raises:
        UserError: the file cannot be read, or names an image that the bank lacks, or none of a
            class.
    """
    at = f"evaluate.lowshot.files: {printable(path)}"
    names = _lines(path, at)
    positions = _positions(names, catalogue)
    missing = [name for name in names if name not in positions]
    if missing:
        raise UserError(
            f"{at}: {len(missing)} of its {len(names)} images are not in the training split: "
            f"{quoted(missing)}"
        )
    index = np.unique([_only(positions[name], name, catalogue, at) for name in names])
    if len(index) < len(names):
        raise UserError(f"{at}: it names {len(names) - len(index)} images twice")
    counts = np.bincount(catalogue.labels[index], minlength=len(catalogue.classes))
    require_all(counts, catalogue.classes, at)
    if (counts == counts[0]).all():
        return Shots(int(counts[0]), path, index)
    return Shots(f"{100 * len(index) / len(catalogue.labels):.2g}%", path, index)


def _lines(path: str, at: str) -> list[str]:
    try:
        with open(native_path(path), encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [printable(local_name(line.strip())) for line in file]
    except OSError as error:
        raise UserError(f"{at}: {error.strerror}") from error
    names = [line for line in lines if line]
    if not names:
        raise UserError(f"{at}: no image in this list")
    return names


def _positions(names: Sequence[str], catalogue: Catalogue) -> dict[str, list[int]]:
    """The positions in the bank that each name may stand for."""
    wanted = set(names)
    whole: dict[str, list[int]] = defaultdict(list)
    last: dict[str, list[int]] = defaultdict(list)
    for position in range(len(catalogue.labels)):
        key = printable(catalogue.name(position))
        if key in wanted:
            whole[key].append(position)
        if (name := key.rsplit("/", 1)[-1]) in wanted:
            last[name].append(position)
    return {**last, **whole}


def _only(positions: Sequence[int], name: str, catalogue: Catalogue, at: str) -> int:
    """The one position that a name means; raises UserError if it may be several."""
    if len(positions) > 1:
        prefix = name.split("_", 1)[0]
        labels = {p: catalogue.classes[catalogue.labels[p]] for p in positions}
        positions = [p for p in positions if labels[p] == prefix] or positions
    if len(positions) > 1:
        several = [catalogue.name(position) for position in positions]
        raise UserError(
            f"{at}: '{name}' is the name of {len(several)} images: {quoted(several)}; write the "
            "path inside the data folder"
        )
    if catalogue.labels[positions[0]] < 0:
        raise UserError(f"{at}: '{name}' has no label in the training split")
    return positions[0]
