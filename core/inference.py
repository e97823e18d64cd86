"""What an engine computes without training: features, logits, attention.

Shape letters:
    N: images per batch.
    C: channels.
    H: height.
    W: width.
    L: patches.
    D: feature width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import cast

import numpy as np

from triptych.core import parameters
from triptych.core.config.spec import RunSpec, VitSpec
from triptych.core.contracts import (
    ALONE,
    Array,
    Classifier,
    Context,
    LinearModel,
    Networks,
    Ops,
    Ranks,
    Tensor,
)
from triptych.core.machine.failures import device_failures
from triptych.core.parallel.stage import Stage

PICK: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda x: x[:, 0],
    "mean": lambda x: x[:, 1:].mean(1),
    "all": lambda x: x,
}
"""Name -> features that ``Inference.embed`` makes of an encoder's tokens (N, 1+L, D)."""


class Inference(ABC):
    """The networks of one run on one backend, in evaluation mode."""

    model: Networks
    stage: Stage | None = None
    """Of this process, if the networks are divided among the stages of a pipeline."""
    failures: tuple[type[Exception], ...] = ()
    """Exceptions by which the framework says that memory is out or a kernel is missing."""

    def __init__(self, spec: RunSpec, ops: Ops, context: Context, ranks: Ranks = ALONE) -> None:
        self.spec, self.ops, self.context, self.ranks = spec, ops, context, ranks

    @abstractmethod
    def tensor(self, array: Array) -> Tensor:
        """An array as a tensor on the run's device; floating arrays take the run's precision."""

    @abstractmethod
    def array(self, tensor: Tensor) -> Array:
        """A copy of a tensor as an array; waits for the device."""

    def embed(
        self,
        images: Array,
        *,
        branch: str = "student",
        layers: Sequence[int] = (),
        tokens: str = "cls",
        projection: bool = False,
    ) -> dict[str, Array]:
        """Frozen features in evaluation mode (running statistics, no gradient).

        Args:
            images: (N, C, H, W), normalised.
            branch: "student" or "teacher".
            layers: 0-based indices of blocks (in a ResNet: stages) whose raw output is added.
            tokens: "cls" (N, D), "mean" of the patch tokens (N, D), or "all" (N, 1+L, D). In a
                ResNet the mean of the map's positions takes the place of the class token. The
                positions follow it row by row.
            projection: whether the projector's output is added.

        Returns:
            Arrays in the run's precision:

            - "final": output after the last norm.
            - "layer<i>": output of block i, for each i in ``layers``.
            - "projection": (N, output_dim), if asked for.

        Raises:
            ValueError: ``projection`` is asked for, and the method has no projector.
            DeviceError: see ``core.machine.failures``.
        """
        if projection:
            self.require_projector()
        with self._device_failures(), self.ops.no_grad():
            whole = tokens != "cls" or bool(layers)
            computed = self.model.features(
                branch, self.tensor(images), layers, projection=projection, whole=whole
            )
            outputs = {name: self._arrived(x) for name, x in computed.items()}
            # The projection has no tokens to pick from.
            picks = {name: PICK[tokens] for name in outputs if name != "projection"}
            features = {**outputs, **{name: pick(outputs[name]) for name, pick in picks.items()}}
        return {name: self.array(x) for name, x in features.items()}

    def classify(self, images: Array, *, branch: str = "student") -> Array:
        """The logits of every classifier, in evaluation mode and without gradient.

        Args:
            images: (N, C, H, W), normalised; or cached features (N, D), if the method trains on
                such features.
            branch: "student" or "teacher".

        Returns:
            (classifiers, N, classes) in the run's precision.

        Raises:
            ValueError: the method has no classifier.
            DeviceError: see ``core.machine.failures``.
        """
        if not self.spec.method.labelled:
            raise ValueError(f"method {self.spec.method.name} has no classifier")
        model = cast(Classifier, self.model)
        with self._device_failures(), self.ops.no_grad():
            logits = [self._arrived(x) for x in model.classify(branch, self.tensor(images))]
        return np.stack([self.array(scores) for scores in logits])

    def frozen_features(self, images: Array) -> Array:
        """The features that the classifiers of a linear probe get.

        Args:
            images: (N, C, H, W), normalised.

        Returns:
            (N, D) in the run's precision.

        Raises:
            DeviceError: see ``core.machine.failures``.
        """
        with self._device_failures(), self.ops.no_grad():
            features = cast(LinearModel, self.model).frozen(self.tensor(images))
            return self.array(self._arrived(features))

    def attention(self, images: Array, *, branch: str = "student") -> Array:
        """The attention of the class token in the last block of a ViT, in evaluation mode.

        Args:
            images: (N, C, H, W), normalised.
            branch: "student" or "teacher".

        Returns:
            (N, heads, 1+L) in the run's precision: the class token itself, then the patches row by
            row. Rows sum to 1.

        Raises:
            ValueError: the encoder is no ViT.
            DeviceError: see ``core.machine.failures``.
        """
        if not isinstance(self.spec.model, VitSpec):
            raise ValueError(f"{self.spec.model.name} has no class token")
        with self._device_failures(), self.ops.no_grad():
            return self.array(self.model.attention(branch, self.tensor(images)))

    def require_projector(self) -> None:
        """Raises ValueError if the method has no projector."""
        if not parameters.parts(self.spec).projector.layers:
            raise ValueError(f"method {self.spec.method.name} has no projector")

    def _arrived(self, x: Tensor) -> Tensor:
        """What the last stage of a pipeline has computed, on all its stages."""
        return x if self.stage is None else self.stage.of_the_last(x)

    def _device_failures(self) -> AbstractContextManager[None]:
        return device_failures(self.failures, self.spec, self.context.device)
