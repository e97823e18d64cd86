"""Update rules in NumPy, one tensor at a time, in place."""

import numpy as np

from triptych.core.engine import Array


def adamw(
    value: Array,
    gradient: Array,
    exp_avg: Array,
    exp_avg_sq: Array,
    *,
    count: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2; decay scaled by the learning rate as in PyTorch).

    Args:
        count: updates including this one, from 1.
    """
    exp_avg += (1.0 - betas[0]) * (gradient - exp_avg)
    exp_avg_sq += (1.0 - betas[1]) * (gradient * gradient - exp_avg_sq)
    mean = exp_avg / (1.0 - betas[0] ** count)
    scale = np.sqrt(exp_avg_sq / (1.0 - betas[1] ** count)) + eps
    value *= 1.0 - lr * weight_decay
    value -= lr * mean / scale


def clip_coefficient(gradients: list[Array], max_norm: float) -> float:
    """Factor on all gradients to clip their global L2 norm: min(1, max_norm / (norm + 1e-6))."""
    norm = np.sqrt(sum(float(np.sum(g * g)) for g in gradients))
    return min(1.0, max_norm / (float(norm) + 1e-6))
