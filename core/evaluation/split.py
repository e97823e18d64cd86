"""The evaluation split of a spec and the features of its images, for every protocol."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.data import (
    Source,
    Splits,
    Subset,
    labels_of,
    open_splits,
    split_digest,
)
from triptych.core.errors import NonFiniteError, UserError, printable
from triptych.core.evaluation.sharing import Compute, Met, Sharing, shared
from triptych.core.evaluation.subject import Subject


@dataclass(frozen=True)
class Labelled:
    """Features and labels of the images that could be read.

    Attributes:
        features: (N, D), finite.
        labels: (N,) int64.
        skipped: names of the damaged files, which were left out.
        warned: file name -> text of an image library's warning about it.
        digest: hexadecimal digest of the N images and their labels.
        index: (N,) int64, the positions of these images in their half of the split.
    """

    features: Array
    labels: Array
    skipped: Sequence[str]
    warned: Mapping[str, str]
    digest: str
    index: Array


@dataclass(frozen=True)
class Features:
    """Both halves of a split.

    Attributes:
        bank: the labelled images.
        queries: the images to classify.
    """

    bank: Labelled
    queries: Labelled

    @property
    def digest(self) -> str:
        """Identifies the evaluated images: other images or labels give another digest."""
        return f"{self.bank.digest[:16]}-{self.queries.digest[:16]}"

    @property
    def skipped(self) -> int:
        """Number of damaged files that were left out."""
        return len(self.bank.skipped) + len(self.queries.skipped)

    @property
    def image_warnings(self) -> int:
        """Number of files that an image library has warned about."""
        return len({*self.bank.warned, *self.queries.warned})


@dataclass(frozen=True)
class Catalogue:
    """The images of the bank, before any is read.

    Attributes:
        name: position of an image -> its name, which does not depend on the location of the data.
        labels: (N,) int64, positions in ``classes``; -1 for no label.
        classes: names of the labels.
    """

    name: Callable[[int], str]
    labels: Array
    classes: tuple[str, ...]


class Halves(Protocol):
    """The labelled bank and the labelled queries that a protocol evaluates."""

    @property
    def spec(self) -> RunSpec:
        """Its section ``evaluate`` holds the settings of the protocols."""

    def catalogue(self) -> Catalogue:
        """The images of the bank.

        Raises:
            UserError: they have no labels.
        """

    def labels(self) -> tuple[Array, Array]:
        """Labels of all images of the bank and of the queries, int64; -1 for no label."""

    def features(self, subject: Subject, labelled: Array | None = None) -> Features:
        """Features and labels of both halves.

        Args:
            labelled: positions in the bank, of the images that are needed; None: all.

        Raises:
            UserError: a damaged file (see ``data.on_error``), no readable image, or a worker died.
            NonFiniteError: the features are not finite.
        """


class Split:
    """The labelled bank and the labelled queries of a spec.

    Args:
        splits: the spec's splits; None: they are opened here.

    Raises:
        UserError: the data have no labelled evaluation split.
    """

    def __init__(self, spec: RunSpec, splits: Splits | None = None) -> None:
        self.spec = spec
        splits = splits or open_splits(spec)
        if splits.held_out is None:
            raise UserError(
                f"evaluate: data.name {spec.data.name} has no labelled evaluation split as it is "
                f"given; set {spec.data.held_out_key}"
            )
        self.bank, self.queries = splits.bank, splits.held_out
        self._shared: dict[Subject, Features] | None = None
        self._unreported: list[str] = []
        self._met: set[str] = set()
        self._warned: dict[str, str] = {}
        self._digests: dict[tuple[Source, frozenset[str]], str] = {}

    def catalogue(self) -> Catalogue:
        """See ``Halves``."""
        if not self.bank.classes:
            raise UserError(f"evaluate: data.name {self.spec.data.name}: the images have no labels")
        return Catalogue(self.bank.key, _labels(self.bank), self.bank.classes)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Inside, the features of all images are computed once for each subject."""
        self._shared = {}
        try:
            yield
        finally:
            self._shared = None

    def features(self, subject: Subject, labelled: Array | None = None) -> Features:
        """See ``Halves``."""
        if self._shared is None or labelled is not None:
            return self._features(subject, labelled)
        if subject not in self._shared:
            self._shared[subject] = self._features(subject, None)
        return self._shared[subject]

    def _features(self, subject: Subject, labelled: Array | None) -> Features:
        bank = self.bank if labelled is None else Subset(self.bank, labelled)
        return Features(self._labelled(subject, bank), self._labelled(subject, self.queries))

    def labels(self) -> tuple[Array, Array]:
        """See ``Halves``."""
        return _labels(self.bank), _labels(self.queries)

    def damaged(self) -> list[str]:
        """Names of the files left out since the last call; no name is returned twice."""
        names, self._unreported = self._unreported, []
        return names

    def warnings(self) -> list[tuple[str, str]]:
        """(file name, warning) pairs so far, one for each file."""
        return list(self._warned.items())

    def computed(
        self,
        source: Source,
        met: Met,
        compute: Compute,
        sharing: Sharing,
        interpolation: str | None = None,
    ) -> Iterator[tuple[list[Array], Array]]:
        """What ``compute`` gives for one half, batch by batch, and the positions in it (n,).

        Args:
            source: ``bank``, a part of it, or ``queries``.
            met: is complete after the last batch.
            compute: images (n, C, H, W), positions (n,) -> arrays.
            sharing: the processes that share the images.
            interpolation: of the images; None: ``augment.eval_interpolation``.

        Raises:
            UserError: as in ``features``; or as ``compute``.
        """
        spec = self.spec
        if interpolation:
            augment = spec.augment.model_copy(update={"eval_interpolation": interpolation})
            spec = spec.model_copy(update={"augment": augment})
        yield from shared(spec, source, met, compute, sharing)
        self._unreported += [name for name in dict.fromkeys(met.skipped) if name not in self._met]
        self._met.update(met.skipped)
        self._warned |= met.warned
        met.digest = self._digest(source, frozenset(met.skipped))

    def _labelled(self, subject: Subject, source: Source) -> Labelled:
        def compute(images: Array, index: Array) -> list[Array]:
            subject.check()
            features = subject.embed(images)
            if not np.isfinite(features).all():
                raise NonFiniteError(f"evaluation after step {subject.step}: features not finite")
            return [features]

        met, sharing = Met(), subject.sharing
        found = list(self.computed(source, met, compute, sharing, subject.choice.interpolation))
        index = np.concatenate([positions for _, positions in found])
        labels = labels_of(source, index)
        if isinstance(source, Subset):
            index = source.index[index]
        rows = np.concatenate([features for (features,), _ in found])
        return Labelled(rows, labels, met.skipped, met.warned, met.digest, index)

    def _digest(self, source: Source, skipped: frozenset[str]) -> str:
        """The digest, cached: a million images take seconds, and damaged files seldom change."""
        key = source, skipped
        if key not in self._digests:
            self._digests[key] = split_digest(source, skipped)
        return self._digests[key]


def require_classes(halves: Halves, title: str) -> None:
    """Checks the labels that a classification of the queries by the bank needs.

    Args:
        title: the protocol's name in messages.

    Raises:
        UserError: an image has no label, the bank has one class only, or a query has a class that
            is not in the bank.
    """
    classes = halves.catalogue().classes
    bank, queries = halves.labels()
    for half, labels in (("training", bank), ("held-out", queries)):
        if missing := int((labels < 0).sum()):
            raise UserError(
                f"evaluate: {title} needs labels, and {missing} of the {len(labels)} {half} images "
                f"of data.name {halves.spec.data.name} have none"
            )
    if len(np.unique(bank)) == 1:
        raise UserError(
            f"evaluate: {title} needs two classes, and all {len(bank)} training images are of one: "
            f"{printable(classes[bank[0]])}"
        )
    unknown = np.setdiff1d(queries, bank)
    if len(unknown):
        raise UserError(
            f"evaluate: {title}: no training image has the class {printable(classes[unknown[0]])} "
            "of held-out images; add some to the training images, or leave the class out"
        )


def _labels(source: Source) -> Array:
    """(N,) int64, -1 for none."""
    return labels_of(source, np.arange(len(source)))
