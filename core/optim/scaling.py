"""The scale of the loss in float16 (arXiv 1710.03740, section 3.2), chosen while a run goes on.

Small gradients become 0 in float16. Those of a loss with a large factor do not; the factor is
divided out before the update. If it was too large, a gradient is not finite: the update is left
out, and the next step has a smaller factor.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from triptych.core.contracts import Array, Slot, State
from triptych.core.errors import NonFiniteError

FIRST, LEAST, MOST = 2**16, 1, 2**32
"""Scales. Powers of 2, so that neither the factor nor the division rounds."""
GROWTH, INTERVAL = 2, 2000
"""By how much the scale grows after so many updates in a row, or falls after one left out."""
SCALE, GOOD_STEPS = "optimizer.scale", "optimizer.good_steps"
ENTRIES = (SCALE, GOOD_STEPS, "optimizer.skipped")
"""Canonical names of the attributes of ``LossScale``."""


@dataclass
class LossScale:
    """The scale of a run, as part of its state.

    Attributes:
        scale: factor of the loss.
        good_steps: updates since the scale has changed.
        skipped: updates that were left out in the whole run.
    """

    scale: int = FIRST
    good_steps: int = 0
    skipped: int = 0

    def update(self, *, finite: bool) -> None:
        """Counts a step.

        Args:
            finite: whether its gradients were finite, so that the update was made.

        Raises:
            NonFiniteError: the gradients were not finite, and the scale cannot fall.
        """
        if not finite:
            if self.scale == LEAST:
                raise NonFiniteError(
                    f"the gradients are not finite in float16, though the loss has the factor "
                    f"{LEAST}; use precision=bfloat16 or float32"
                )
            self.skipped += 1
            self.scale, self.good_steps = self.scale // GROWTH, 0
            return
        self.good_steps += 1
        if self.good_steps == INTERVAL:
            self.scale, self.good_steps = min(self.scale * GROWTH, MOST), 0

    def slots(self) -> dict[str, Slot]:
        """Its part of the state, by canonical name."""
        return {name: Slot.counter(self, name.partition(".")[2]) for name in ENTRIES}


def steps_behind(state: Mapping[str, Array]) -> int:
    """Number of steps that made a state, with the updates that were left out; 0: not known."""
    return sum(int(state.get(f"optimizer.{name}", 0)) for name in ("step", "skipped"))


def fitted(state: Mapping[str, Array], precision: str) -> State:
    """A state from elsewhere, with the scale that a run in this precision has, or without one."""
    fresh = {name: slot.read() for name, slot in LossScale().slots().items()}
    if precision == "float16":
        return {**fresh, **state}
    return {name: array for name, array in state.items() if name not in fresh}
