"""Fine-tuning: encoder and classifier are trained together on labels.

MOCA and MoCo v3 follow the recipes of MAE (arXiv 2111.06377, appendix A.1) and DeiT (arXiv
2012.12877).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np

from triptych.core.config.spec import FinetuneSpec, RunSpec, VitSpec
from triptych.core.contracts import Array, Batch, FinetuneModel, Hyper, Outcome, Step, Tensor
from triptych.core.methods import mixing
from triptych.core.methods.supervised import (
    CHANCE,
    FLAT,
    LOSSES,
    REMEDY,
    WHOLE,
    chance,
    judged,
    settled,
    spread,
    status,
    targets,
)
from triptych.core.random import stream

__all__ = [
    "CHANCE",
    "FLAT",
    "LOSSES",
    "REMEDY",
    "WHOLE",
    "chance",
    "check_draws",
    "draws",
    "finish",
    "judged",
    "loss",
    "places",
    "predict",
    "prepare",
    "settled",
    "spread",
    "status",
    "targets",
]

FinetuneStep = Step[FinetuneModel, FinetuneSpec]


def draws(spec: RunSpec, step: int) -> dict[str, Array]:
    """The random numbers of mixing (``core.methods.mixing.draws``) and drop-path.

    Returns:
        ``drop_path_keep``: (2 * (depth - 1), N) int64, 0 or 1: whether each sample keeps a residual
            branch. Every block but the first has two rows, for its attention and then its MLP. The
            array is absent without drop-path.
    """
    method, count = cast(FinetuneSpec, spec.method), spec.train.batch_size
    mixed = mixing.draws(method.mixing, spec.seed, step, count, spec.model.size)
    if not method.drop_path:
        return mixed
    depth = cast(VitSpec, spec.model).depth
    kept = np.repeat(1.0 - _drop_rates(method.drop_path, depth)[1:], 2)[:, None]
    uniform = stream(spec.seed, "drop_path", step).random((len(kept), count))
    return {**mixed, "drop_path_keep": (uniform < kept).astype(np.int64)}


def check_draws(spec: RunSpec, draws: Mapping[str, Array]) -> None:
    """See ``core.contracts.Method``."""
    keep = draws.get("drop_path_keep")
    if keep is not None and not np.isin(keep, (0, 1)).all():
        raise ValueError("drop_path_keep: expected 0 or 1")
    mixing.check_draws(_mixing_draws(draws), spec.model.size)


def prepare(batch: Batch, draws: Mapping[str, Array], spec: FinetuneSpec) -> Batch:
    """Mixes the images, and makes the probabilities to predict from the labels."""
    images, targets = mixing.mix(batch, _mixing_draws(draws), spec.classes, spec.mixing.smoothing)
    return replace(batch, views=(images,), targets=targets, partners=None)


def places(step: FinetuneStep, part: Batch, batch: Batch) -> dict[str, Array]:
    """``scales`` (2 * depth, n): the factors of all residual branches, if there is drop-path."""
    keep = step.draws.get("drop_path_keep")
    if keep is None:
        return {}
    # The last batch of an epoch may be smaller than its draws.
    keep = keep[:, part.rows][:, : len(part.index)]
    return {"scales": branch_scales(keep, step.spec.drop_path)}


def predict(step: FinetuneStep, part: Batch, number: int) -> tuple[Tensor, Tensor]:
    """The feature (N, D) of each image, and the logits (N, classes).

    Args:
        part: one view (N, C, H, W).
    """
    return step.model.predict(part.views[0], part.places.get("scales"))


def loss(
    step: FinetuneStep,
    part: Batch,
    features: tuple[Tensor, Tensor],
    targets: Mapping[str, Tensor],
    number: int,
) -> Outcome:
    """The cross-entropy between predicted and wanted probabilities of the classes.

    Args:
        part: with the wanted probabilities.
        features: feature and logits.
    """
    feature, logits = features
    value = step.ops.kl_divergence(part.targets, logits) + step.ops.entropy(part.targets)
    return Outcome(value, features={"feature": feature, "logits": logits})


def finish(model: FinetuneModel, outcome: Outcome, hyper: Hyper) -> None:
    """Moves the average of the weights, if there is one, towards the new weights."""
    model.update_teacher(hyper.ema)


def branch_scales(keep: Array, drop_path: float) -> Array:
    """The factors of all residual branches.

    A kept branch is divided by the probability that it is kept (arXiv 1603.09382).

    Args:
        keep: ``drop_path_keep`` of ``draws``.
        drop_path: drop rate of the last block.

    Returns:
        (2 * depth, N) float64.
    """
    rates = _drop_rates(drop_path, 1 + len(keep) // 2)
    factors = np.ones((2 * len(rates), keep.shape[1]))
    factors[2:] = keep / (1.0 - np.repeat(rates[1:], 2)[:, None])
    return factors


def _mixing_draws(draws: Mapping[str, Array]) -> dict[str, Array]:
    return {name: array for name, array in draws.items() if name.startswith("mix_")}


def _drop_rates(last: float, depth: int) -> Array:
    """The drop rate of each block, (depth,)."""
    return last * np.arange(depth) / max(depth - 1, 1)
