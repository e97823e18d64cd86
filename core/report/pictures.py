"""The pictures of a run: its accuracy, mistakes, neighbours, and maps of what it sees.

They are HTML and SVG, which follow the reader's light or dark screen, and small PNG images.
"""

from collections.abc import Sequence
from typing import cast
from xml.etree.ElementTree import Element

import numpy as np

from triptych.core.config.spec import VitSpec
from triptych.core.contracts import Array
from triptych.core.data import Subset, indexed_batches
from triptych.core.errors import printable
from triptych.core.evaluation import maps
from triptych.core.evaluation.gallery import (
    Gallery,
    Half,
    Predictions,
    most_confused,
    spread,
    worst,
)
from triptych.core.report.images import Pixels, fitted, heat, picture, unnormalized
from triptych.core.report.markup import element
from triptych.core.report.scatter import scatter

MOST = 40
"""Most classes in the table of accuracies and in the confusion matrix."""
MISTAKES = 24
"""Number of mistakes shown."""
ROWS, NEAREST = 8, 6
"""Number of images whose neighbours are shown, and number of neighbours."""
SEEN = 6
"""Number of images whose patches and attention are shown."""
SIDE = 80
"""Length of the longer side of an image on the page, CSS pixels."""


def section(gallery: Gallery) -> list[Element]:
    """Everything about one run."""
    parts = [element("p", _about(gallery))]
    if gallery.predictions is None:
        text = "An image has no label, so there are no accuracies and no mistakes."
        parts.append(element("p", text, class_="note"))
    else:
        tables = [*_accuracies(gallery), *_confusion(gallery)]
        parts += [element("div", *tables, class_="beside"), *_mistakes(gallery)]
    return [*parts, *_neighbours(gallery), *_maps(gallery), *_seen(gallery)]


def _about(gallery: Gallery) -> str:
    model = gallery.model
    kind = "held-out" if gallery.held_out else "training"
    feature = "mean of the patches" if model.tokens == "mean" else "class token"
    if not isinstance(model.spec.model, VitSpec):
        feature = "mean of the last map"
    words = [
        f"After step {model.step}: {len(gallery.queries.index)} {kind} images and "
        f"{len(gallery.bank.index)} training images, drawn from all. Feature of an image: the "
        f"{model.branch}'s {feature}."
    ]
    if gallery.predictions is not None:
        right = np.mean(gallery.predictions.predicted == gallery.queries.labels)
        words.append(f"Predicted by {gallery.predictions.by}: {100 * right:.1f} % right.")
    if gallery.skipped:
        words.append(f"Damaged files left out: {gallery.skipped}.")
    return " ".join(words)


# ----------------------------------------------------------------------------------------- classes


def _accuracies(gallery: Gallery) -> list[Element]:
    """Accuracy of each class, the lowest first."""
    counts = gallery.confusion
    images = counts.sum(axis=1)
    present = np.flatnonzero(images)
    share = np.diag(counts)[present] / images[present]
    order = present[np.argsort(share, kind="stable")]
    note = "Share of the images that get their class, the lowest first."
    if len(order) > MOST:
        order = np.concatenate([order[: MOST // 2], order[-MOST // 2 :]])
        note += f" Only the {MOST // 2} worst and the {MOST // 2} best classes."
    rows = []
    for label in order:
        right = counts[label, label] / images[label]
        bar = element("td", f"{100 * right:.1f} %", class_="bar", style=f"--share:{right:.3f}")
        name = element("th", gallery.classes[label], scope="row")
        rows.append(element("tr", name, element("td", str(images[label])), bar))
    head = element("tr", *(element("th", t, scope="col") for t in ("class", "images", "right")))
    table = element("table", element("thead", head), element("tbody", *rows))
    return [_titled("Accuracy per class", note, element("div", table, class_="wide"))]


def _confusion(gallery: Gallery) -> list[Element]:
    counts = gallery.confusion
    shown = most_confused(counts, MOST)
    table = counts[np.ix_(shown, shown)]
    names = [gallery.classes[label] for label in shown]
    note = "A row for each class, a column for each prediction."
    if len(shown) < len(counts):
        note += f" Only the {len(shown)} classes with the most mistakes; last, all others."
        table = np.column_stack([table, counts[shown].sum(axis=1) - table.sum(axis=1)])
        names.append("others")
    turned = "turned" if max(map(len, names)) > 3 else None
    head = [element("th", name, scope="col", class_=turned) for name in names]
    rows = [
        element("tr", element("th", names[i], scope="row"), *_cells(row, i))
        for i, row in enumerate(table)
    ]
    drawn = element(
        "table",
        element("thead", element("tr", element("th", ""), *head)),
        element("tbody", *rows),
        class_="confusion",
    )
    return [_titled("Confusion matrix", note, element("div", drawn, class_="wide"))]


def _cells(row: Array, label: int) -> list[Element]:
    """The counts of one label, each shaded by its share."""
    total = max(1, int(row.sum()))
    return [
        element(
            "td",
            str(count) if count else "",
            class_="hit" if column == label else "miss",
            style=f"--share:{count / total:.3f}" if count else None,
        )
        for column, count in enumerate(row)
    ]


def _mistakes(gallery: Gallery) -> list[Element]:
    queries, predictions = gallery.queries, cast(Predictions, gallery.predictions)
    rows = worst(queries.labels, predictions, MISTAKES)
    if not len(rows):
        return [_titled("Worst mistakes", "There is none.")]
    tiles = []
    for row, pixels, name in zip(
        rows, _read(gallery, queries, rows), queries.names(rows), strict=True
    ):
        label = gallery.classes[queries.labels[row]]
        said = gallery.classes[predictions.predicted[row]]
        lines = [label, f"not {said} ({100 * predictions.confidence[row]:.0f}\N{NO-BREAK SPACE}%)"]
        tiles.append(_tile(pixels, f"{name}: {label}, taken for {said}", lines, "other"))
    note = (
        "The class of each image, and below it the prediction with its share of the votes or its "
        "probability."
    )
    return [_titled("Worst mistakes", note, element("ul", *tiles, class_="tiles"))]


def _neighbours(gallery: Gallery) -> list[Element]:
    """Some images of all classes, each before its nearest training images."""
    queries, bank, classes = gallery.queries, gallery.bank, gallery.classes
    rows = spread(queries.labels, ROWS)
    similarity, index = gallery.nearest(rows, NEAREST)
    found = iter(_read(gallery, bank, index.ravel()))
    lists = []
    for i, (row, pixels) in enumerate(zip(rows, _read(gallery, queries, rows), strict=True)):
        own = classes[queries.labels[row]] if classes else ""
        tiles = [_tile(pixels, f"{queries.names(rows[i : i + 1])[0]} {own}", [own], "query")]
        for near, name in zip(index[i], bank.names(index[i]), strict=True):
            label = classes[bank.labels[near]] if classes else ""
            same = "same" if label == own else "other"
            place = len(tiles) - 1
            lines = [f"{similarity[i, place]:.2f}", label]
            tiles.append(_tile(next(found), f"neighbour {place + 1}: {name} {label}", lines, same))
        lists.append(element("ul", *tiles, class_="tiles"))
    note = (
        "An image, then the training images whose features are most similar, each with the cosine "
        "similarity and its class."
    )
    return [_titled("Nearest neighbours", note, *lists)]


# -------------------------------------------------------------------------------------------- maps


def _maps(gallery: Gallery) -> list[Element]:
    queries = gallery.queries
    made = maps.plane(queries.features)
    if made is None:
        note = f"There is none: fewer than {maps.FEWEST} images, or all features are equal."
        return [_titled("Maps of the features", note)]
    points, share = made
    note = f"{len(points)} images" + (", coloured by class." if gallery.classes else ".")
    kinds = {
        f"PCA, {100 * share:.0f} % of the variance": points,
        "t-SNE": maps.neighbourhoods(queries.features),
    }
    drawn = [
        scatter(title, note, places, queries.labels, gallery.classes)
        for title, places in kinds.items()
    ]
    return [_titled("Maps of the features", note, element("div", *drawn, class_="beside even"))]


def _seen(gallery: Gallery) -> list[Element]:
    """The patches of some images as colours, and the attention of the class token."""
    model, rows = gallery.model, spread(gallery.queries.labels, SEEN)
    images = _images(gallery, gallery.queries, rows)
    tokens = model.engine.embed(images, branch=model.held, tokens="all")["final"][:, 1:]
    shape = maps.grid(model.spec.model)
    colours = maps.patch_colours(tokens).reshape(-1, *shape, 3)
    attention = np.zeros((len(rows), 0, *shape))
    if isinstance(model.spec.model, VitSpec):
        weights = model.engine.attention(images, branch=model.held)[:, :, 1:]
        weights = np.concatenate([weights.mean(axis=1, keepdims=True), weights], axis=1)
        attention = weights.reshape(*weights.shape[:2], *shape)
    elif shape == (1, 1):
        note = "The last map of the encoder has one position only, so there is no picture of it."
        return [_titled("What the encoder sees", note)]
    lists = []
    names = gallery.queries.names(rows)
    for image, name, colour, heads in zip(images, names, colours, attention, strict=True):
        size = fitted((image.shape[2], image.shape[1]), SIDE)
        pixels = unnormalized(image, model.spec)
        tiles = [_tile(pixels, name, ["image"])]
        tiles.append(_tile(colour, f"PCA of the patches of {name}", ["PCA"], size=size))
        for i, values in enumerate(heads):
            what = f"head {i}" if i else "attention, mean"
            shaded = heat(values / max(float(values.max()), 1e-12))
            tiles.append(_tile(shaded, f"{what}, of {name}", [what], size=size))
        lists.append(element("ul", *tiles, class_="tiles"))
    return [_titled("What the encoder sees", _seen_note(gallery), *lists)]


def _seen_note(gallery: Gallery) -> str:
    if isinstance(gallery.model.spec.model, VitSpec):
        return (
            "The three main directions of the patch tokens as red, green and blue, the same in all "
            "images; and how strongly the class token attends to each patch in the last block, "
            "from dark (0) to light (the largest of the picture)."
        )
    return (
        "The three main directions of the last feature map as red, green and blue, the same in all "
        "images. A residual network has no class token, so there is no attention."
    )


# ------------------------------------------------------------------------------------------ images


def _images(gallery: Gallery, half: Half, rows: Array) -> Array:
    """The images in these rows, prepared as for the encoder. (n,) -> (n, C, H, W)."""
    spec = gallery.model.spec
    here = spec.model_copy(update={"data": spec.data.model_copy(update={"workers": 0})})
    places, back = np.unique(half.index[rows], return_inverse=True)
    batches = indexed_batches(here, Subset(half.source, places), len(places), [], {})
    return np.concatenate([images for images, _ in batches])[back]


def _read(gallery: Gallery, half: Half, rows: Array) -> list[Pixels]:
    images = _images(gallery, half, rows)
    return [unnormalized(image, gallery.model.spec) for image in images]


def _tile(
    pixels: Pixels,
    alt: str,
    lines: Sequence[str],
    kind: str | None = None,
    size: tuple[int, int] | None = None,
) -> Element:
    """A picture with lines of text below it.

    Args:
        size: on the page; None: that of ``pixels``, enlarged or reduced to ``SIDE``.
    """
    size = size or fitted((pixels.shape[1], pixels.shape[0]), SIDE)
    texts = [element("span", line) for line in lines if line]
    return element("li", picture(pixels, size, printable(alt).strip()), *texts, class_=kind)


def _titled(title: str, note: str, *children: Element) -> Element:
    return element("div", element("h3", title), element("p", note, class_="note"), *children)
