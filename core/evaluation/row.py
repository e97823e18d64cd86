"""One evaluation as a row of a run's log, with the properties that every reader uses."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

Share = Annotated[FiniteFloat, Field(ge=0, le=1)]
"""A fraction, 0 to 1."""
RAW_PIXELS = "raw pixels"
"""Value of ``tokens`` in a row that evaluates pixels instead of an encoder's features."""


class Evaluation(BaseModel):
    """A row of any protocol; further keys are kept unchanged.

    Each protocol derives its own model from this one and names its keys there. This version reads
    the rows of a protocol that it does not know as this model: a name, a step, and ``top1`` if the
    row has it.

    Attributes:
        eval: the protocol's name, e.g. "knn".
        step: optimizer steps that trained the weights; 0 for untrained features.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    eval: str
    step: Annotated[int, Field(ge=0)]

    @property
    def title(self) -> str:
        """The protocol's name in reports and on the terminal."""
        return self.eval

    @property
    def variant(self) -> str:
        """What distinguishes this row from others of the same evaluation, e.g. "all labels"."""
        return ""

    @property
    def main(self) -> bool:
        """Whether this is the row of its evaluation that the run is judged by."""
        return True

    @property
    def score(self) -> float | None:
        """The headline metric, 0 to 1, higher is better: ``top1``, if it is a share."""
        top1 = getattr(self, "top1", None)
        return float(top1) if isinstance(top1, int | float) and 0 <= top1 <= 1 else None

    @property
    def measured(self) -> float | None:
        """The number that charts and tables show, in the unit ``sign``: the score in percent."""
        return None if self.score is None else 100 * self.score

    @property
    def metric(self) -> str:
        """Name of ``measured`` beside the axis of a chart."""
        return "top-1"

    @property
    def sign(self) -> str:
        """Unit of ``measured``; empty for a plain number."""
        return "%"

    @property
    def measured_on(self) -> str:
        """What ``metric`` is measured on, for captions."""
        return "held-out images"

    @property
    def tag(self) -> str:
        """Prefix of the row's numbers in TensorBoard, e.g. "knn/10"."""
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

    def details(self) -> list[str]:
        """Further results, one a line, that ``tools/eval.py`` prints below ``line``."""
        return []

    def as_json(self) -> dict[str, Any]:
        """The row as the log stores it."""
        return self.model_dump()


class SplitRow(Evaluation):
    """A row whose numbers come from the images of an evaluation split.

    Attributes:
        branch: as in ``core.evaluation.subject.Subject``.
        split: digest of the evaluated images.
        skipped: number of damaged files that were left out.
        image_warnings: number of files that an image library has warned about.
    """

    branch: str = ""
    split: str = ""
    skipped: int = 0
    image_warnings: int = 0

    def noted(self, parts: list[str]) -> str:
        """The parts of a terminal line in brackets, and how many damaged files were left out."""
        damaged = [f"damaged files left out: {self.skipped}"] if self.skipped else []
        return f"({', '.join([*parts, *damaged])})"
