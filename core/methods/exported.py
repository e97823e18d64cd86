"""What a network computes that is exported to a file, whatever the framework."""

from typing import Any

from triptych.core.contracts import Tensor


def outputs(model: Any, branch: str, images: Tensor, *, logits: bool) -> tuple[Tensor, ...]:
    """What an exported network computes.

    Args:
        model: networks of a method; with ``logits`` a ``Classifier``.
        branch: "student" or "teacher".
        images: (N, C, H, W).
        logits: whether the outputs are those of the classifiers.

    Returns:
        The features (N, D), or the logits (N, classes) of each classifier.
    """
    if logits:
        return tuple(model.classify(branch, images))
    return (getattr(model, branch).encoder(images),)
