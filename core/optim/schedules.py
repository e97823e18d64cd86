"""Learning rate, weight decay and EMA momentum as pure functions of the progress of a run.

Progress and lengths share one unit, fractional epochs or steps. No schedule has a state, so a
resumed run needs the step only.
"""

import math


def cosine(start: float, end: float, fraction: float) -> float:
    """Half-cosine from ``start`` (fraction 0) to ``end`` (fraction 1)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * fraction))


def line(start: float, end: float, length: float, position: float) -> float:
    """A straight line from ``start`` (position 0) to ``end`` (position ``length``).

    A line without length is at its end.
    """
    return start + (end - start) * position / length if length > 0 else end


def warmup_cosine(
    peak: float,
    end: float,
    warmup: float,
    total: float,
    position: float,
    *,
    start: float = 0.0,
    top: float | None = None,
    begin: float | None = None,
) -> float:
    """Linear warm-up from ``start``, then a half-cosine to ``end`` (MoCo v3, appendix A).

    With a warm-up, the value at position 0 is exactly ``start``.

    Args:
        peak: highest value of warm-up and cosine.
        end: value at ``total``.
        warmup: length of the warm-up, in the unit of ``total``.
        total: length of the schedule.
        position: progress, 0 <= position <= total.
        start: value at position 0.
        top: position at which the warm-up reaches ``peak``; None: ``warmup``.
        begin: position at which the cosine has its ``peak``; None: ``warmup``.
    """
    if position < warmup:
        return line(start, peak, warmup if top is None else top, position)
    begin = warmup if begin is None else begin
    return cosine(peak, end, (position - begin) / (total - begin) if total > begin else 1.0)


def multistep(peak: float, milestones: tuple[float, ...], factor: float, position: float) -> float:
    """Multiplies ``peak`` by ``factor`` for each milestone reached (MoCo v1, section 4)."""
    value = peak
    for milestone in milestones:
        value *= factor if position >= milestone else 1.0
    return value


def ema_momentum(base: float, total: float, position: float) -> float:
    """The teacher's momentum: a half-cosine from ``base`` to 1 (BYOL, eq. 1; MoCo v3)."""
    return 1.0 - (1.0 - base) * 0.5 * (1.0 + math.cos(math.pi * position / total))


def scaled_lr(lr: float, batch_size: int, reference: int | None) -> float:
    """The peak learning rate by the linear rule: ``lr * batch_size / reference``.

    It is ``lr`` if ``reference`` is None.
    """
    return lr if reference is None else lr * batch_size / reference
