"""k-NN of a run's features: on its evaluation split, with all labels and with a few per class."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array
from triptych.core.data import Source, evaluation_batches, open_evaluation, split_digest
from triptych.core.engine import Engine
from triptych.core.errors import UserError
from triptych.core.evaluation import knn
from triptych.core.runs.log import Row

BATCH = 256
"""Images embedded at once."""

Embed = Callable[[Array], Array]
"""(N, C, H, W) normalised images -> (N, D) features."""


class KnnProtocol:
    """The evaluation split of a spec and how its features are judged.

    Raises:
        UserError: the data have no labelled evaluation split.
    """

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        split = open_evaluation(spec)
        if split is None:
            raise UserError(
                f"evaluate: data.name {spec.data.name} has no labelled evaluation split as it is "
                "given; set data.eval_root, or evaluate.every to 0"
            )
        self.bank, self.queries = split
        largest = max(Counter(self.bank.label(i) for i in range(len(self.bank))).values())
        # As many as the largest class has are all labels, and are told of as such.
        self.per_class = [count for count in spec.evaluate.per_class if count < largest]
        self.digest = "-".join(split_digest(source)[:16] for source in split)

    def engine(
        self, engine: Engine, step: int, *, branch: str = "student", tokens: str = "cls"
    ) -> list[Row]:
        """Rows for an engine's frozen encoder. Arguments as in ``core.engine.Engine.embed``."""

        def embed(images: Array) -> Array:
            return engine.embed(images, branch=branch, tokens=tokens)["final"]

        return self.rows(embed, {"step": step, "branch": branch, "tokens": tokens})

    def raw_pixels(self) -> list[Row]:
        """Rows for the normalised pixels themselves: what an encoder has to be compared with."""

        def flatten(images: Array) -> Array:
            return images.reshape(len(images), -1)

        return self.rows(flatten, {"step": 0, "branch": "none", "tokens": "raw pixels"})

    def rows(self, embed: Embed, about: Row) -> list[Row]:
        """One row with all labels and one for each of ``evaluate.per_class`` that asks for fewer.

        Args:
            about: what is being judged; goes into each row.
        """
        bank, bank_labels = self._features(embed, self.bank)
        queries, query_labels = self._features(embed, self.queries)
        found = []
        for count in (None, *self.per_class):
            chosen = knn.few_labels(bank_labels, count) if count else np.arange(len(bank))
            k = min(self.spec.evaluate.k, len(chosen))
            top1 = knn.accuracy(
                bank[chosen],
                bank_labels[chosen],
                queries,
                query_labels,
                k=k,
                temperature=self.spec.evaluate.temperature,
            )
            found.append(
                {
                    "eval": "knn",
                    **about,
                    "labels": count or "all",
                    "top1": top1,
                    "k": k,
                    "temperature": self.spec.evaluate.temperature,
                    "bank": len(chosen),
                    "queries": len(queries),
                    "split": self.digest,
                }
            )
        return found

    def _features(self, embed: Embed, source: Source) -> tuple[Array, Array]:
        pairs = [
            (embed(images), labels)
            for images, labels in evaluation_batches(self.spec, source, BATCH)
        ]
        return (
            np.concatenate([features for features, _ in pairs]),
            np.concatenate([labels for _, labels in pairs]),
        )
