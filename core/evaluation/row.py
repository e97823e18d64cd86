"""One evaluation as a row of a run's log: what every reader may ask of it."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
"""A fraction, 0 to 1."""
RAW_PIXELS = "raw pixels"
"""``tokens`` of a row about pixels in the place of an encoder's features."""


class Evaluation(BaseModel):
    """A row of any protocol; keys that are not named here are kept as they are.

    A protocol derives its own model from this one and names its keys there. Rows of a protocol
    that this version does not know stay what they are here: a name, a step, and ``top1`` if given.

    Attributes:
        eval: the protocol's name, e.g. "knn".
        step: optimizer steps behind the weights; 0 for what was not trained.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    eval: str
    step: Annotated[int, Field(ge=0)]

    @property
    def title(self) -> str:
        """The protocol's name for people."""
        return self.eval

    @property
    def variant(self) -> str:
        """What tells this row from the others of the same evaluation, e.g. "all labels"."""
        return ""

    @property
    def main(self) -> bool:
        """Whether a run is judged by this row, among those of the same evaluation."""
        return True

    @property
    def score(self) -> float | None:
        """The headline metric, 0 to 1, higher is better: ``top1``, if it is a share."""
        top1 = getattr(self, "top1", None)
        return float(top1) if isinstance(top1, int | float) and 0 <= top1 <= 1 else None

    @property
    def tag(self) -> str:
        """What the row's numbers are called by in TensorBoard, e.g. "knn/10"."""
        return self.eval

    @property
    def features(self) -> str:
        """Where the features come from: "trained", "random init" or "raw pixels"."""
        if getattr(self, "tokens", None) == RAW_PIXELS:
            return RAW_PIXELS
        return "trained" if self.step else "random init"

    def line(self) -> str:
        """The row as one line for the terminal."""
        score = "" if self.score is None else f" top-1 {100 * self.score:.2f} %"
        return f"step {self.step} {self.title}{score}"

    def as_json(self) -> dict[str, Any]:
        """The row as it is written."""
        return self.model_dump()
