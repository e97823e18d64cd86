"""Scalars of one step as pure functions of its index: learning rate, weight decay, EMA momentum.

Progress is measured in fractional epochs, so a schedule counted in steps is the case of one step
per epoch. Nothing is stateful: the step is all that resuming needs.
"""

import math


def cosine(start: float, end: float, fraction: float) -> float:
    """Half-cosine from ``start`` (fraction 0) to ``end`` (fraction 1)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * fraction))


def warmup_cosine(peak: float, end: float, warmup: float, total: float, position: float) -> float:
    """Linear warm-up from 0, then a half-cosine to ``end`` over the rest (MoCo v3, appendix A).

    Args:
        peak: value reached at ``warmup``.
        end: value at ``total``.
        warmup: length of the warm-up, same unit as ``total``.
        total: length of the schedule.
        position: 0 <= position <= total; the value at 0 is exactly 0 when there is a warm-up.
    """
    if position < warmup:
        return peak * position / warmup
    return cosine(peak, end, (position - warmup) / (total - warmup) if total > warmup else 1.0)


def multistep(peak: float, milestones: tuple[float, ...], factor: float, position: float) -> float:
    """``peak`` multiplied by ``factor`` at each milestone reached (MoCo v1, section 4)."""
    value = peak
    for milestone in milestones:
        value *= factor if position >= milestone else 1.0
    return value


def ema_momentum(base: float, total: float, position: float) -> float:
    """Momentum of the teacher rising from ``base`` to 1 on a half-cosine (BYOL, eq. 1; MoCo v3)."""
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * position / total))


def scaled_lr(lr: float, batch_size: int, reference: int | None) -> float:
    """Peak learning rate by the linear rule: ``lr * batch_size / reference``; ``lr`` if None."""
    return lr if reference is None else lr * batch_size / reference
