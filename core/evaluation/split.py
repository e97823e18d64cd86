"""The evaluation split of a spec and the features of its images, for every protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.data import Source, Splits, evaluation_batches, open_splits, split_digest
from triptych.core.errors import NonFiniteError, UserError
from triptych.core.evaluation.subject import Subject

BATCH = 256
"""Number of images embedded at once."""


@dataclass(frozen=True)
class Labelled:
    """Features and labels of the images that could be read.

    Attributes:
        features: (N, D), finite.
        labels: (N,) int64.
        skipped: names of the damaged files, which were left out.
        warned: file name -> text of an image library's warning about it.
        digest: hexadecimal digest of the N images and their labels.
    """

    features: Array
    labels: Array
    skipped: Sequence[str]
    warned: Mapping[str, str]
    digest: str


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


class Split:
    """The labelled bank and the labelled queries of a spec.

    Args:
        splits: the spec's splits; None: they are opened here.

    Raises:
        UserError: the data have no labelled evaluation split.
    """

    def __init__(self, spec: RunSpec, splits: Splits | None = None) -> None:
        self.spec = spec
        train, held_out = splits or open_splits(spec)
        if held_out is None:
            raise UserError(
                f"evaluate: data.name {spec.data.name} has no labelled evaluation split as it is "
                "given; set data.eval_root, or evaluate.every to 0"
            )
        self.bank, self.queries = train, held_out
        self._unreported: list[str] = []
        self._met: set[str] = set()
        self._warned: dict[str, str] = {}
        self._digests: dict[tuple[bool, frozenset[str]], str] = {}

    def features(self, subject: Subject) -> Features:
        """Features and labels of both halves.

        Raises:
            UserError: a damaged file (see ``data.on_error``), no readable image, or a worker died.
            NonFiniteError: the features are not finite.
        """
        return Features(self._labelled(subject, self.bank), self._labelled(subject, self.queries))

    def damaged(self) -> list[str]:
        """Names of the files left out since the last call; no name is returned twice."""
        names, self._unreported = self._unreported, []
        return names

    def warnings(self) -> list[tuple[str, str]]:
        """(file name, warning) pairs so far, one for each file."""
        return list(self._warned.items())

    def _labelled(self, subject: Subject, source: Source) -> Labelled:
        skipped: list[str] = []
        warned: dict[str, str] = {}
        features, labels = [], []
        for images, known in evaluation_batches(self.spec, source, BATCH, skipped, warned):
            subject.check()
            features.append(subject.embed(images))
            if not np.isfinite(features[-1]).all():
                raise NonFiniteError(f"evaluation after step {subject.step}: features not finite")
            labels.append(known)
        self._unreported += [name for name in dict.fromkeys(skipped) if name not in self._met]
        self._met.update(skipped)
        self._warned |= warned
        digest = self._digest(source, frozenset(skipped))
        return Labelled(np.concatenate(features), np.concatenate(labels), skipped, warned, digest)

    def _digest(self, source: Source, skipped: frozenset[str]) -> str:
        """The digest, cached: a million images take seconds, and damaged files seldom change."""
        key = source is self.bank, skipped
        if key not in self._digests:
            self._digests[key] = split_digest(source, skipped)
        return self._digests[key]
