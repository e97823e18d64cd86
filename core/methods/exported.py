"""What a network computes that is exported to a file, whatever the framework."""

from typing import Any

from triptych.core.contracts import Tensor


class Exported:
    """The feature of each image, or the logits of each classifier.

    A backend's class inherits from this class first and from the framework's module class last.

    Args:
        model: networks of a method; with ``logits`` a ``Classifier``.
        branch: "student" or "teacher".
        logits: whether the outputs are those of the classifiers.
    """

    def __init__(self, model: Any, branch: str, *, logits: bool) -> None:
        super().__init__()  # of the framework's module class
        self.model, self.branch, self.logits = model, branch, logits

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """The features (N, D), or the logits (N, classes) of each classifier.

        Args:
            images: (N, C, H, W).
        """
        if self.logits:
            return tuple(self.model.classify(self.branch, images))
        return (getattr(self.model, self.branch).encoder(images),)
