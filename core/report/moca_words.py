"""Masks, codes and words of a MOCA run for a few images.

The NumPy reference computes them from the newest whole checkpoint of the run. Any backend may have
written the checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from triptych.core import checkpoint
from triptych.core.config.method import Round
from triptych.core.config.spec import MocaSpec, RunSpec, VitSpec
from triptych.core.contracts import State
from triptych.core.data import evaluation_batches, open_splits
from triptych.core.errors import UserError
from triptych.core.methods import masking, moca
from triptych.core.reference import ops
from triptych.core.reference.encoders import vit
from triptych.core.report.images import Pixels, colour, picture, unnormalized
from triptych.core.report.markup import element

COUNT = 6
"""Number of images shown."""
FREQUENT = 4
"""Number of words listed beside each image."""
SIDE = 144
"""Least length of the shorter side of a picture on the page, pixels."""
PICTURES = ("image", "round 1", "round 2", "surest words")
"""Headings of the pictures of an image."""
HIDDEN, DECODED, VISIBLE = range(3)
"""State of a token in a masking round; a DECODED token is hidden and predicted."""


@dataclass(frozen=True)
class Example:
    """One image.

    Attributes:
        pixels: (H, W, 3) uint8.
        rounds: one (rows, columns) array for each of two rounds: HIDDEN, DECODED or VISIBLE.
        words: (rows, columns) int64; the most probable word of each token.
        frequent: (word, share) pairs of the image's bag of words, the largest share first.
    """

    pixels: Pixels
    rounds: Sequence[NDArray[np.int64]]
    words: NDArray[np.int64]
    frequent: Sequence[tuple[int, float]]


def examples(spec: RunSpec, state: State, step: int) -> list[Example]:
    """The first held-out images of a run, or training images where none are held out.

    Args:
        state: the run's state after ``step`` updates.
        step: the masks are those of the last of these updates.

    Raises:
        UserError: the images are missing or damaged.
    """
    model, method = cast(VitSpec, spec.model), cast(MocaSpec, spec.method)
    images = _images(spec)
    codes = _codes(images, state, model, method)
    bags = codes[:, masking.interior(model.grid, method.border)].mean(1)
    draws = moca.draws(spec, max(step - 1, 0))
    counts = method.rounds(codes.shape[1])
    masks = [
        _mask(draws[f"mask_ids_round{i}"][: len(images)], count, model.grid)
        for i, count in enumerate(counts, 1)
    ]
    return [
        Example(
            pixels=unnormalized(images[i], spec),
            rounds=[mask[i] for mask in masks],
            words=codes[i].argmax(-1).reshape(model.grid),
            frequent=[(int(k), float(bags[i, k])) for k in np.argsort(-bags[i])[:FREQUENT]],
        )
        for i in range(len(images))
    ]


def section(spec: RunSpec, run_dir: Path) -> list[Element]:
    """The pictures of a run as a table, or a line that says why the run has none."""
    try:
        path = checkpoint.latest(run_dir, lambda _damage: None)
        if path is None:
            return [element("p", "No whole checkpoint is there, so there are no pictures.")]
        manifest, state = checkpoint.read(path)
        shown = examples(spec, state, manifest.step)
    except UserError as error:
        # The rest of the page needs neither the checkpoint nor the images.
        return [element("p", f"There are no pictures: {error}")]
    headings = (*PICTURES, "most frequent words")
    head = element("tr", *(element("th", text, scope="col") for text in headings))
    rows = [_row(example, number) for number, example in enumerate(shown, 1)]
    table = element("table", element("thead", head), element("tbody", *rows), class_="pictures")
    note = (
        f"Words and codes are the teacher's, from {path.name}. In a masking round the student sees "
        "the clear patches and predicts the codes of the clear and the faint patches; grey patches "
        "are left out. Each colour stands for one word, the same in all images. A percentage is "
        "the word's share of the image's bag of words."
    )
    return [element("div", table, class_="wide"), element("p", note, class_="note")]


def _images(spec: RunSpec) -> NDArray[np.float64]:
    """Normalised images (n, C, H, W); n is at most COUNT and at most the batch size."""
    here = spec.model_copy(update={"data": spec.data.model_copy(update={"workers": 0})})
    splits = open_splits(here)
    source = splits.train if splits.held_out is None else splits.held_out
    count = min(COUNT, len(source), spec.train.batch_size)
    (batch,) = islice(evaluation_batches(here, source, count), 1)
    return batch[0].astype(np.float64)


def _codes(
    images: NDArray[np.float64], state: State, model: VitSpec, method: MocaSpec
) -> NDArray[np.float64]:
    """The teacher's code of each token, (n, L, K)."""
    values = {
        name: array.astype(np.float64)
        for name, array in state.items()
        if name.startswith("teacher.") or name in ("memory.words", "memory.distance_used")
    }
    tokens = vit(values, "teacher.encoder", images, model)["final"][:, 1:]
    sharpness = method.inverse_delta / values["memory.distance_used"]
    codes: NDArray[np.float64] = ops.soft_assign(tokens, values["memory.words"], sharpness)[0]
    return codes


def _mask(order: NDArray[np.int64], count: Round, grid: tuple[int, int]) -> NDArray[np.int64]:
    mask = np.full(order.shape, HIDDEN, np.int64)
    np.put_along_axis(mask, order[:, : count.decoded], DECODED, axis=1)
    np.put_along_axis(mask, order[:, : count.visible], VISIBLE, axis=1)
    return mask.reshape(-1, *grid)


# ----------------------------------------------------------------------------------------- drawing


def _row(example: Example, number: int) -> Element:
    height, width = example.pixels.shape[:2]
    size = (width, height)
    masked = [_masked(example.pixels, _enlarged(mask, size)) for mask in example.rounds]
    colours = np.array([colour(int(word)) for word in example.words.ravel()], np.uint8)
    words = colours.reshape(*example.words.shape, 3)
    pictures = [example.pixels, *masked, words]
    texts = _descriptions(example, number)
    cells = [element("td", _picture(*pair, size)) for pair in zip(pictures, texts, strict=True)]
    items = [_named(word, share) for word, share in example.frequent]
    return element("tr", *cells, element("td", element("ul", *items, class_="words")))


def _descriptions(example: Example, number: int) -> list[str]:
    """The alternative text of each picture of ``PICTURES``."""
    rounds = [
        f"image {number}, {title}: {(mask == VISIBLE).sum()} of {mask.size} patches clear, "
        f"{(mask == DECODED).sum()} faint"
        for title, mask in zip(PICTURES[1:3], example.rounds, strict=True)
    ]
    words = f"image {number}: {len(np.unique(example.words))} words, one colour each"
    return [f"image {number}", *rounds, words]


def _masked(pixels: Pixels, mask: NDArray[np.int64]) -> Pixels:
    faint = pixels // 3 + 160
    picked = np.select(
        [mask[..., None] == VISIBLE, mask[..., None] == DECODED], [pixels, faint], 96
    )
    return picked.astype(np.uint8)


def _enlarged(mask: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.int64]:
    image = Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return np.asarray(image).astype(np.int64)


def _picture(pixels: Pixels, alt: str, size: tuple[int, int]) -> Element:
    """An image embedded in the page; each pixel becomes a square of whole pixels."""
    times = -(-SIDE // min(size))
    width, height = (side * times for side in size)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
    return picture(np.asarray(image), (width, height), alt)


def _named(word: int, share: float) -> Element:
    red, green, blue = colour(word)
    dot = element("rect", width=10, height=10, fill=f"rgb({red},{green},{blue})")
    return element(
        "li",
        element("svg", dot, viewBox="0 0 10 10", width=10, height=10),
        f" {word}: {100 * share:.1f} %",
    )
