"""The numbers behind the pictures of a run: its features and predictions on some images.

The classes come from the run's classifier. A run without a classifier is judged by its nearest
neighbours, as its spec sets them.

Shape letters:
    Q: images that are classified.
    B: images whose neighbours they are.
    D: feature width.
    C: classes.
    H: classifiers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import numpy as np

from triptych.core.config.spec import FinetuneSpec, LinearSpec, RunSpec, SupervisedSpec
from triptych.core.contracts import Array
from triptych.core.data import Source, Splits, Subset, class_names, indexed_batches, labels_of
from triptych.core.engine import Engine
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.evaluation import knn
from triptych.core.evaluation.neighbours import neighbours
from triptych.core.evaluation.scores import Tally, confusion
from triptych.core.evaluation.sharing import BATCH
from triptych.core.parameters import parts
from triptych.core.random import stream

BANK = 5
"""Training images that are embedded for each held-out image."""


class Model(NamedTuple):
    """The networks of a run.

    Attributes:
        spec: of the run.
        engine: of ``core.launch.open_engine`` if the method is labelled, else of ``open_encoder``.
        step: optimizer steps that trained the weights.
    """

    spec: RunSpec
    engine: Engine
    step: int

    @property
    def branch(self) -> str:
        """Whose encoder is shown: "student" or "teacher"."""
        if not self.spec.method.labelled:
            return self.spec.evaluate.branch
        return "teacher" if parts(self.spec).teacher == "everything" else "student"

    @property
    def held(self) -> str:
        """The name of this branch in the engine."""
        return self.branch if self.spec.method.labelled else "student"

    @property
    def tokens(self) -> str:
        """The feature of an image, as in ``core.engine.Engine.embed``."""
        if not self.spec.method.labelled:
            return self.spec.evaluate.tokens
        pooling = cast(LinearSpec | FinetuneSpec, self.spec.method).pooling
        return "mean" if pooling == "mean" else "cls"


@dataclass(frozen=True)
class Half:
    """Images and their features.

    Attributes:
        source: the images.
        index: (N,) int64, the positions in ``source`` of those that could be read.
        features: (N, D), finite.
        labels: (N,) int64, -1 for no label.
    """

    source: Source
    index: Array
    features: Array
    labels: Array

    def names(self, rows: Array) -> list[str]:
        """Names of the images in these rows of ``features``."""
        return [self.source.key(int(self.index[row])) for row in rows]


@dataclass(frozen=True)
class Predictions:
    """The class predicted for each of the Q images.

    Attributes:
        by: what predicts, in words.
        predicted: (Q,) int64.
        confidence: (Q,) float64, share of the votes, or probability, of the predicted class.
        own: (Q,) float64, that of the label.
    """

    by: str
    predicted: Array
    confidence: Array
    own: Array


@dataclass(frozen=True)
class Gallery:
    """What the pictures of a run show.

    Attributes:
        classes: names of the classes; empty if an image has no label.
        queries: the Q images.
        bank: the B training images.
        held_out: whether the queries are held out. Otherwise they are training images, too.
        predictions: None if an image has no label.
        skipped: number of damaged files that were left out.
    """

    model: Model
    classes: tuple[str, ...]
    queries: Half
    bank: Half
    held_out: bool
    predictions: Predictions | None
    skipped: int = 0

    def nearest(self, rows: Array, count: int) -> tuple[Array, Array]:
        """The nearest images of the bank for some queries, the nearest first.

        Args:
            rows: (n,) int64, rows of ``queries``.
            count: K, at most B of them are returned.

        Returns:
            Cosine similarities (n, K) and rows of ``bank`` (n, K).
        """
        features = self.queries.features[rows]
        return neighbours(self.bank.features, features, min(count, len(self.bank.index)))

    @property
    def confusion(self) -> Array:
        """(C, C) int64, a row for each label. Only with predictions."""
        predicted = cast(Predictions, self.predictions).predicted
        return confusion(self.queries.labels, predicted, len(self.classes))


@dataclass(frozen=True)
class Drawn:
    """The images of a gallery before they are read; no image is in both halves.

    Attributes:
        queries: the images to classify.
        bank: training images.
        held_out: as in ``Gallery``.
    """

    queries: Subset
    bank: Subset
    held_out: bool


def draw(splits: Splits, count: int) -> Drawn:
    """Draws images. The same data always give the same ones.

    Args:
        count: most images to classify; the bank gets at most ``BANK`` times as many.

    Raises:
        UserError: there are fewer than two images.
    """
    order = stream(0, "pictures").permutation(len(splits.bank))
    if splits.held_out is None:
        source, count = splits.bank, min(count, len(order) // 2)
        if not count:
            raise UserError("--pictures: there are fewer than two images")
        chosen, order = order[:count], order[count:]
    else:
        source = splits.held_out
        chosen = stream(0, "pictures", 1).permutation(len(source))[:count]
    bank = Subset(splits.bank, np.sort(order[: BANK * count]))
    return Drawn(Subset(source, np.sort(chosen)), bank, splits.held_out is not None)


def gather(
    model: Model, images: Drawn, advance: Callable[[int], None] = lambda _done: None
) -> Gallery:
    """Reads the images and computes features and predictions.

    Args:
        images: of the run's spec.
        advance: called with the number of images so far.

    Raises:
        UserError: a file is damaged (see ``data.on_error``), or the data have other classes than
            the classifier.
        NonFiniteError: features or logits are not finite.
    """
    _check_classes(model.spec, images.queries)
    reader = _Reader(model, advance)
    shown = reader.half(images.queries, classify=model.spec.method.labelled)
    stored = reader.half(images.bank)
    labelled = min(shown.labels.min(), stored.labels.min()) >= 0
    predictions = None
    if labelled and reader.tally is not None:
        predictions = reader.predictions(shown.labels)
    elif labelled:
        predictions = _voted(model.spec, shown, stored)
    names = class_names(model.spec.data, images.bank.classes) if labelled else ()
    return Gallery(
        model=model,
        classes=names,
        queries=shown,
        bank=stored,
        held_out=images.held_out,
        predictions=predictions,
        skipped=reader.skipped,
    )


def _check_classes(spec: RunSpec, source: Source) -> None:
    count = len(source.classes)
    if isinstance(spec.method, SupervisedSpec) and count not in (0, spec.method.classes):
        raise UserError(
            f"method.classes: {spec.method.classes}, but the images of data.name {spec.data.name} "
            f"have {count} classes; give the data that the run was trained on"
        )


@dataclass
class _Reader:
    """Runs the networks over images, and remembers what the classifiers say."""

    model: Model
    advance: Callable[[int], None]
    done: int = 0
    skipped: int = 0
    tally: Tally | None = None
    confidence: list[Array] = field(default_factory=list)
    own: list[Array] = field(default_factory=list)

    def half(self, source: Subset, *, classify: bool = False) -> Half:
        model, skipped = self.model, list[str]()
        features, positions = [], []
        for images, index in indexed_batches(model.spec, source, BATCH, skipped, {}):
            outputs = model.engine.embed(images, branch=model.held, tokens=model.tokens)
            features.append(_finite(outputs["final"]))
            positions.append(index)
            labels = labels_of(source, index)
            if classify and labels.min() >= 0:
                self._classify(images, labels)
            self.done += len(index)
            self.advance(self.done)
        self.skipped += len(skipped)
        index = np.concatenate(positions)
        return Half(source, index, np.concatenate(features), labels_of(source, index))

    def _classify(self, images: Array, labels: Array) -> None:
        logits = _finite(self.model.engine.classify(images, branch=self.model.held))
        logits = logits.astype(np.float64)
        shares = np.exp(logits - logits.max(axis=2, keepdims=True))
        shares /= shares.sum(axis=2, keepdims=True)
        self.tally = self.tally or Tally()
        self.tally.add(logits, labels)
        self.confidence.append(shares.max(axis=2))
        self.own.append(shares[:, np.arange(len(labels)), labels])

    def predictions(self, labels: Array) -> Predictions:
        """Those of the best classifier."""
        scores = cast(Tally, self.tally).scores()
        best, heads = scores.best, len(scores.top1)
        confidence, own = (np.concatenate(x, axis=1)[best] for x in (self.confidence, self.own))
        by = "the classifier" if heads == 1 else f"the best of {heads} classifiers (no. {best})"
        return Predictions(by, scores.predicted[best].astype(np.int64), confidence, own)


def _voted(spec: RunSpec, queries: Half, bank: Half) -> Predictions:
    """The classes that the nearest neighbours vote for."""
    k, temperature = min(spec.evaluate.every_k[0], len(bank.index)), spec.evaluate.temperatures[0]
    similarity, index = neighbours(bank.features, queries.features, k)
    count = int(max(bank.labels.max(), queries.labels.max())) + 1
    shares = knn.votes(similarity, bank.labels[index], temperature, count)
    shares /= shares.sum(axis=1, keepdims=True)
    rows = np.arange(len(shares))
    predicted = shares.argmax(axis=1)
    by = f"k-NN (k {k}, temperature {temperature:g}, {len(bank.index)} training images)"
    return Predictions(by, predicted, shares[rows, predicted], shares[rows, queries.labels])


def _finite(values: Array) -> Array:
    if not np.isfinite(values).all():
        raise NonFiniteError("pictures: the features or logits of the run are not finite")
    return values


# -------------------------------------------------------------------- which images and classes


def worst(labels: Array, predictions: Predictions, count: int) -> Array:
    """Rows of the mistakes whose label got the least compared with the prediction; (n,) int64.

    Args:
        labels: (Q,) int64.
        count: n is at most this number, and at most the number of mistakes.
    """
    wrong = np.flatnonzero(predictions.predicted != labels)
    margin = (predictions.own - predictions.confidence)[wrong]
    chosen: Array = wrong[np.argsort(margin, kind="stable")[:count]]
    return chosen


def spread(labels: Array, count: int) -> Array:
    """At most ``count`` rows, evenly over the images in the order of their labels; (n,) int64."""
    order = np.argsort(labels, kind="stable")
    count = min(count, len(order))
    chosen: Array = order[(np.arange(count) * len(order) + len(order) // 2) // count]
    return chosen


def most_confused(counts: Array, most: int) -> Array:
    """The classes with the most mistakes, to and fro; ascending, int64.

    Args:
        counts: (C, C), a row for each label.
        most: number of classes returned, if C is larger.
    """
    errors = counts.sum(0) + counts.sum(1) - 2 * np.diag(counts)
    return np.sort(np.argsort(-errors, kind="stable")[:most])
