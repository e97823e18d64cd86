"""Is the loss normal? The state of a run in a word, from its logged losses and feature spreads.

A contrastive loss has a chance level: its value when the features tell no image from another. A
run that stays there learns nothing, and one that returns there has collapsed, whatever the number
looks like. Both are judged from the history alone, so a resumed run that replays its log says the
same words as one that was never stopped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal, get_args

import numpy as np

from triptych.core.contracts import Batch

State = Literal["at chance", "learning", "collapsed"]
STATES: tuple[State, ...] = get_args(State)

WINDOW = 5
"""Logged steps that are averaged: one batch may be lucky."""
PATIENCE = 20
"""Logged steps before a state that lasts is called lasting."""
GAIN = 0.02
"""Loss below chance, relative to it, from which a run is learning."""
LEARNED = 0.05
"""The same, from which a return to chance is a collapse and not a slow start."""
FLAT_SPREAD = 0.1
"""Feature spread (see ``core.engine.feature_std``) below which rows are nearly parallel. Behind a
last batch norm (MoCo v3) it stays near 1 even in a collapse; there the loss alone tells."""
EQUAL_SPREAD = 0.01
"""Feature spread below which rows are the same, whatever the loss says (it may be trivially 0)."""
PINNED = 0.002
"""A loss this close to chance, relative to it, in every row: only equal features do that. Random
features scatter around a value above chance (by a few percent for MoCo v3 at its start)."""
LEAST = 1e-6
"""Chance level, in nats, that counts as none."""
LOST = 0.05
"""Fall of an evaluation's headline metric, below its best so far, that is worth a line."""
LONG = 0.1
"""Fraction of the run, beyond which a run still at chance gets advice."""


def judge(
    losses: Sequence[float],
    spreads: Sequence[float],
    chance: float,
    *,
    best: float = 0.0,
    flat: float = FLAT_SPREAD,
) -> State:
    """The state at the last of some logged steps.

    Args:
        losses: of the latest steps, oldest first; at least one, and no use in more than PATIENCE.
        spreads: feature spreads of the same steps.
        chance: loss of features that tell nothing apart; > 0.
        best: largest relative gain over chance, averaged over WINDOW steps, since the start.
        flat: spread below which features that do not beat chance have collapsed.

    Returns:
        "collapsed": the features of a window are equal, or nearly so without beating chance; or
        the run had beaten chance clearly and none of the last WINDOW steps does; or the loss has
        sat on the chance level itself for PATIENCE steps. "learning": a window beats chance.
        "at chance": everything else, above chance included.
    """
    gains = [1.0 - loss / chance for loss in losses]
    gain, spread = fmean(gains[-WINDOW:]), fmean(spreads[-WINDOW:])
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
STUCK = (
    "still at chance: nothing is being learned yet. Look at optim.lr and its warm-up, at "
    "method.temperature, and whether the two augmented views still share content"
)
WORSE = (
    "the features get worse, whatever the loss says: {title} {now:.1f} % after {best:.1f} %. "
    "Lower optim.lr; {remedy}"
)


def alike(batch: Batch) -> bool:
    """Whether all images of a view are equal, so that features differ by rounding alone.

    A batch norm makes such differences as large as real ones, on one framework more than on
    another.
    """
    return any(all(np.array_equal(image, view[0]) for image in view[1:]) for view in batch.views)


@dataclass
class Health:
    """Follows one run. chance, flat: as in ``judge``; remedy: what else helps when it collapses."""

    chance: float
    flat: float = FLAT_SPREAD
    remedy: str = "make the two views share more"
    state: State = "at chance"
    lasting: int = 0
    """Logged steps in the present state."""
    _best: float = 0.0
    _losses: list[float] = field(default_factory=list)
    _spreads: list[float] = field(default_factory=list)
    _scores: dict[str, float] = field(default_factory=dict)
    """Protocol -> best headline metric."""
    _worse: set[str] = field(default_factory=set)
    _advised: set[State] = field(default_factory=set)

    def observe(
        self, loss: float, spread: float, *, chance: float | None = None, settled: bool = True
    ) -> State:
        """Takes one logged step into account and says what the state is now.

        Args:
            chance: of this step, where it is another at each.
            settled: whether the loss can be judged yet. Before, the state stays as it is.
        """
        if not settled:
            return self.state
        if chance is not None and chance != self.chance:
            # Targets that are all alike can be met without looking: no gain is possible.
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
        """One line of help when a run has collapsed or is long at chance; each once.

        Args:
            progress: fraction of the run that is done, 0..1.
        """
        stuck = self.state == "at chance" and self.lasting >= PATIENCE and progress >= LONG
        if self.state in self._advised or not (stuck or self.state == "collapsed"):
            return None
        self._advised.add(self.state)
        return STUCK if stuck else COLLAPSED.format(remedy=self.remedy)

    def evaluated(self, title: str, score: float) -> str | None:
        """One line, once per protocol, when features got worse by LOST since their best.

        Args:
            title: the protocol's name for people.
            score: its headline metric, 0 to 1.
        """
        best = self._scores[title] = max(self._scores.get(title, 0.0), score)
        if title in self._worse or best - score < LOST:
            return None
        self._worse.add(title)
        return WORSE.format(title=title, best=100 * best, now=100 * score, remedy=self.remedy)
