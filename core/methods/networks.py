"""Student and teacher as modules of any framework: what a backend's networks need no framework for.

A backend's class inherits one of these beside the framework's module class, and builds the parts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from triptych.core.contracts import Array, Slot, Tensor


class Branches:
    """``core.contracts.Networks``, and ``Model`` but for the move of the teacher."""

    student: Any
    teacher: Any

    def compute(self, part: Callable[..., Any], *arguments: Tensor) -> Any:
        """What a part of the networks gives, computed in the precision of the run.

        A backend with a mixed precision overrides this. Nothing else of a step is in mixed
        precision: what comes back is float32, or float64 where that is the precision.
        """
        return part(*arguments)

    def query(self, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.compute(self.student, view)

    def key(self, view: Tensor) -> Tensor:
        """See ``core.contracts.Model``."""
        return self.compute(self.teacher, view)

    def features(
        self, branch: str, images: Tensor, layers: Sequence[int], *, projection: bool
    ) -> dict[str, Tensor]:
        """See ``core.contracts.Networks``."""
        module = getattr(self, branch)
        module.eval()
        features: dict[str, Tensor] = dict(module.encoder.tokens(images, layers))
        if projection:
            features["projection"] = module.projector(features["final"][:, 0])
        module.train()
        return features

    def counters(self) -> dict[str, Slot]:
        """See ``core.contracts.Networks``."""
        memory = getattr(self, "memory", None)
        names: Sequence[str] = getattr(memory, "counters", ())
        return {f"memory.{name}": Slot.counter(memory, name) for name in names}


class MocaBranches(Branches):
    """``core.contracts.MocaModel`` but for the move of the teacher and the codebook."""

    grid: tuple[int, int]
    early_layer: int

    def index(self, ids: Array, like: Tensor) -> Tensor:
        """Indices as a tensor of their own beside ``like``. ids: any shape, int64.

        The framework's part: a backend's class defines it.
        """
        raise NotImplementedError

    def teacher_tokens(self, images: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.teacher.encoder.tokens, images)["final"][:, 1:]

    def encode(self, images: Tensor, ids: Array) -> tuple[Tensor, Tensor]:
        """See ``core.contracts.MocaModel``."""
        masked = partial(self.student.encoder.masked, early=self.early_layer)
        early, last = self.compute(masked, images, self.index(ids, images))
        return early, last

    def decode(self, image: Tensor, early: Tensor, ids: Array) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.student.decoder, image, early, self.index(ids, early))

    def image_weights(self, words: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.student.image_predictor, words)

    def dense_weights(self, words: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel``."""
        return self.compute(self.student.dense_predictor, words)
