"""Recorded draws of an original program, in the place of a random generator."""

from typing import Any


class Scripted:
    """Gives recorded draws in order, and checks the bounds that they are asked with.

    It has the methods of NumPy's generator that augmentation draws from.
    """

    def __init__(self, draws: list[list[Any]], exclusive: bool = False) -> None:
        """``draws``: [function, bounds, value]; ``exclusive``: upper bounds of integers are."""
        self.left = list(draws)
        self._past = int(exclusive)

    def _next(self, function: str, bounds: tuple[float, ...]) -> float:
        name, wanted, value = self.left.pop(0)
        if name != function or any(abs(a - b) > 1e-6 for a, b in zip(bounds, wanted, strict=True)):
            raise AssertionError(f"{function}{bounds} asked, {name}{wanted} recorded")
        return value

    def random(self) -> float:
        """As in NumPy."""
        return self._next("random", ())

    def uniform(self, low: float, high: float) -> float:
        """As in NumPy."""
        return self._next("uniform", (low, high))

    def integers(self, low: int, high: int | None = None, endpoint: bool = False) -> int:
        """As in NumPy."""
        first, last = (0, low) if high is None else (low, high)
        if not endpoint:
            raise AssertionError("upper bounds are expected to be included")
        return int(self._next("randint", (first, last + self._past)))
