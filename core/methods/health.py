"""The health of a run: its state in one word, from its logged losses and feature spreads.

A contrastive loss has a chance level: its value when the features do not distinguish images. A run
whose loss stays there learns nothing, and a run whose loss returns there has collapsed, however
small the loss is. The state depends on the logged history alone, so a resumed run that replays its
log gets the same states as an uninterrupted run.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, get_args

import numpy as np

from triptych.core.contracts import Array, Batch

State = Literal["at chance", "learning", "collapsed"]
STATES: tuple[State, ...] = get_args(State)

WINDOW = 5
"""Number of logged steps to average, since a single batch may be easy."""
PATIENCE = 20
"""Number of logged steps after which a state counts as lasting."""
GAIN = 0.02
"""A run learns if its relative gain, 1 - loss / chance, is at least this."""
LEARNED = 0.05
"""If the best relative gain is at least this, a return to chance is a collapse.

Below it, the run only starts slowly."""
FLAT_SPREAD = 0.1
"""Feature spread (``feature_std``) below which the features are nearly parallel.

With a batch norm as last layer (MoCo v3), the spread stays near 1 even in a collapse. There only
the loss shows the collapse."""
EQUAL_SPREAD = 0.01
"""Feature spread below which all features are equal. The loss may then be trivially 0."""
PINNED = 0.002
"""If abs(loss / chance - 1) stays below this for PATIENCE logged steps, all features are equal.

Random features give a loss above chance (by a few percent for MoCo v3 at its start)."""
LEAST = 1e-6
"""A chance level (nats) below this counts as this, so that no loss is divided by 0."""
LOST = 0.05
"""Drop of an evaluation's headline metric below its best that causes a warning line."""
LONG = 0.1
"""Fraction of the run after which a run still at chance gets advice."""


def judge(
    losses: Sequence[float],
    spreads: Sequence[float],
    chance: float,
    *,
    best: float = 0.0,
    flat: float = FLAT_SPREAD,
) -> State:
    """The state of a run after its latest logged steps.

    Args:
        losses: of the latest steps, oldest first. At least one; more than PATIENCE change nothing.
        spreads: feature spreads of the same steps.
        chance: loss of features that do not distinguish images; > 0.
        best: largest relative gain over chance since the start, averaged over WINDOW steps.
        flat: spread below which features that do not beat chance have collapsed; 0: the features
            cannot collapse.

    Returns:
        "collapsed": one of three conditions holds.
            - The features of the last WINDOW steps are equal, or they are nearly equal and their
              loss does not beat chance.
            - The run had beaten chance clearly, and none of the last WINDOW steps beats it.
            - The loss has equalled the chance level for PATIENCE steps.
        "learning": the loss beats chance on average over the last WINDOW steps.
        "at chance": all other cases, also a loss above chance.
    """
    gains = [1.0 - loss / chance for loss in losses]
    gain, spread = fmean(gains[-WINDOW:]), fmean(spreads[-WINDOW:])
    if not flat:
        return "learning" if gain >= GAIN else "at chance"
    whole = len(losses) >= WINDOW
    if whole and (spread < EQUAL_SPREAD or (spread < flat and gain < GAIN)):
        return "collapsed"
    if best >= LEARNED and max(gains[-WINDOW:]) < GAIN:
        return "collapsed"
    if len(gains) >= PATIENCE and max(map(abs, gains[-PATIENCE:])) < PINNED:
        return "collapsed"
    return "learning" if gain >= GAIN else "at chance"


COLLAPSED = (
    "collapsed: the features no longer tell images apart. Resume from a checkpoint before this "
    "with a lower optim.lr or a longer warm-up; {remedy}"
)
STUCK = "still at chance: nothing is being learned yet. Look at optim.lr and its warm-up"
STUCK_VIEWS = ", at method.temperature, and whether the two augmented views still share content"
WORSE = (
    "the features get worse, whatever the loss says: {title} {now:.1f} % after {best:.1f} %. "
    "Lower optim.lr; {remedy}"
)


def alike(batch: Batch) -> bool:
    """Whether some view consists of equal images, so that its features differ by rounding alone.

    A batch norm enlarges rounding differences to the size of real ones, and each framework does so
    to another degree.
    """
    return any(all(np.array_equal(image, view[0]) for image in view[1:]) for view in batch.views)


def feature_std(features: Array) -> float:
    """Spread of features on the unit sphere: 1 if they fill it, 0 if all rows are equal.

    It is the root mean square over dimensions of the standard deviation over rows, times sqrt(D).

    Args:
        features: (N, D), not yet normalised.
    """
    rows = features.astype(np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return float(np.sqrt(rows.var(axis=0).sum()))


@dataclass
class Health:
    """Follows the health of one run.

    Attributes:
        chance: as in ``judge``.
        flat: as in ``judge``.
        remedy: advice against a collapse, besides a lower learning rate.
        state: present state.
        lasting: number of logged steps in the present state.
    """

    chance: float
    flat: float = FLAT_SPREAD
    remedy: str = "make the two views share more"
    state: State = "at chance"
    lasting: int = 0
    _best: float = 0.0
    _losses: list[float] = field(default_factory=list)
    _spreads: list[float] = field(default_factory=list)
    _scores: dict[str, float] = field(default_factory=dict)
    """Maps each protocol to its best headline metric."""
    _worse: set[str] = field(default_factory=set)
    _advised: set[State] = field(default_factory=set)

    def observe(
        self, loss: float, spread: float, *, chance: float | None = None, settled: bool = True
    ) -> State:
        """Adds one logged step and returns the new state.

        Args:
            loss: of the step.
            spread: feature spread of the step.
            chance: chance level of the step, for a method whose level moves.
            settled: whether the loss already depends on the features. If not, the state stays.
        """
        if not settled:
            return self.state
        if chance is not None and chance != self.chance:
            # Chance moves with the targets (MOCA): rescale the loss to the initial chance level.
            loss = loss * self.chance / max(chance, LEAST)
        self._losses = [*self._losses, loss][-PATIENCE:]
        self._spreads = [*self._spreads, spread][-PATIENCE:]
        state = judge(self._losses, self._spreads, self.chance, best=self._best, flat=self.flat)
        if len(self._losses) >= WINDOW:
            self._best = max(self._best, 1.0 - fmean(self._losses[-WINDOW:]) / self.chance)
        self.lasting = self.lasting + 1 if state == self.state else 1
        self.state = state
        return state

    def advice(self, progress: float) -> str | None:
        """One line of advice if the run has collapsed, or has been at chance for long.

        Each of the two is returned once; otherwise the result is None.

        Args:
            progress: fraction of the run that is done, 0 to 1.
        """
        stuck = self.state == "at chance" and self.lasting >= PATIENCE and progress >= LONG
        if self.state in self._advised or not (stuck or self.state == "collapsed"):
            return None
        self._advised.add(self.state)
        if stuck:
            return STUCK + STUCK_VIEWS if self.flat else STUCK
        return COLLAPSED.format(remedy=self.remedy)

    def evaluated(self, title: str, score: float) -> str | None:
        """A warning line, once per protocol, if the score is LOST or more below its best.

        Args:
            title: the protocol's name in messages.
            score: the protocol's headline metric, 0 to 1.
        """
        best = self._scores[title] = max(self._scores.get(title, 0.0), score)
        if title in self._worse or best - score < LOST:
            return None
        self._worse.add(title)
        return WORSE.format(title=title, best=100 * best, now=100 * score, remedy=self.remedy)


def non_finite(values: Array) -> int:
    """Number of infinities and NaNs."""
    if values.dtype.kind not in "fc":
        return 0
    if values.itemsize >= 4:
        # One of them makes the sum one, and a sum takes half the time of looking at each value.
        with np.errstate(all="ignore"):
            if np.isfinite(values.sum()):
                return 0
    return values.size - int(np.isfinite(values).sum())


def first_non_finite(tensors: Iterable[tuple[str, Array]]) -> str:
    """Name and count of the first tensor with infinities or NaNs; empty if all are finite.

    Args:
        tensors: (name, array) pairs in the order of the search. If reading them is a collective
            call, all ranks must call this function.
    """
    for name, array in tensors:
        if bad := non_finite(array):
            return f"{name} ({bad} of {array.size} values)"
    return ""
