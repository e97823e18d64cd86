"""The batches of a linear probe on features that are computed once."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from triptych.core.config.spec import LinearSpec
from triptych.core.contracts import Array, Batch, evenly
from triptych.core.data import Pipeline, Source, epoch_order, labels_of
from triptych.core.engine import Engine
from triptych.core.errors import NonFiniteError
from triptych.core.evaluation.sharing import Met, Sharing, shared


class CachedFeatures:
    """Feeds the trainer with features in the order of ``core.data.Pipeline``.

    Attributes:
        waited: seconds spent waiting for batches: none.
        skipped: names of the damaged files, which have no features.
        warned: (file name, text) of the image libraries' warnings.
    """

    waited = 0.0

    def __init__(self, engine: Engine, source: Source, say: Callable[[str], None]) -> None:
        """Computes the features of all images.

        Raises:
            UserError: a file is damaged (see ``data.on_error``), or a worker died.
            NonFiniteError: features are not finite.
        """
        self.spec, self._replicas = engine.spec, engine.replicas
        say(f"computing the features of {len(source)} images, once")
        met = Met()

        def compute(images: Array, index: Array) -> list[Array]:
            return [engine.frozen_features(images)]

        found = list(shared(self.spec, source, met, compute, Sharing(engine)))
        self._features = np.concatenate([features for (features,), _ in found])
        self._labels = labels_of(source, np.concatenate([index for _, index in found]))
        if not np.isfinite(self._features).all():
            raise NonFiniteError("the features of the frozen encoder are not finite")
        self.skipped: Sequence[str] = met.skipped
        self.warned: Sequence[tuple[str, str]] = list(met.warned.items())
        self._images = len(source)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of the steps ``start`` ... ``stop - 1``, 0-based, over all epochs."""
        train, count = self.spec.train, len(self._labels)
        per_epoch = train.steps_per_epoch(self._images)
        for step in range(start, stop):
            epoch, batch = divmod(step, per_epoch)
            first = batch * train.batch_size
            positions = np.arange(first, min(first + train.batch_size, self._images))
            # Damaged files have no features. In their place the epoch's order begins again.
            rows = epoch_order(self.spec.seed, epoch, count)[positions % count]
            own = evenly(len(rows), self._replicas.rank, self._replicas.count)
            size, rows = len(rows), rows[own]
            features, labels = self._features[rows], self._labels[rows]
            yield Batch((features,), rows, labels, first=own.start, size=size)


def feed(
    engine: Engine, pipeline: Pipeline, source: Source, say: Callable[[str], None]
) -> Pipeline | CachedFeatures:
    """The batches of a run: of images, or of cached features if the spec asks for those.

    Raises:
        UserError, NonFiniteError: as in ``CachedFeatures``.
    """
    method = engine.spec.method
    if isinstance(method, LinearSpec) and method.features == "cached":
        return CachedFeatures(engine, source, say)
    return pipeline
