"""The degrees of parallelism, and the place of each process.

The processes form a grid with the axes pipeline, data and tensor. The numbers of the processes of
one tensor group are contiguous, since these processes exchange the most.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from triptych.core.config.spec import RunSpec
from triptych.core.errors import UserError

Axis = Literal["pipeline", "data", "tensor"]


@dataclass(frozen=True)
class Place:
    """The coordinates of a process, each from 0.

    Attributes:
        pipeline: its stage.
        data: which part of the rows of a batch it has.
        tensor: which part of each divided tensor it has.
    """

    pipeline: int
    data: int
    tensor: int


@dataclass(frozen=True)
class Degrees:
    """The extent of the grid of processes along each axis."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    @classmethod
    def of(cls, spec: RunSpec) -> "Degrees":
        """The degrees of a run."""
        section = spec.parallel
        return cls(section.pipeline, section.data, section.tensor)

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.pipeline * self.data * self.tensor

    def place(self, rank: int) -> Place:
        """The coordinates of a process. rank: 0 to ``world`` - 1."""
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Place(pipeline, data, tensor)

    def rank(self, place: Place) -> int:
        """The number of the process at these coordinates."""
        return (place.pipeline * self.data + place.data) * self.tensor + place.tensor

    def groups(self, axis: Axis) -> list[list[int]]:
        """The processes that differ in one coordinate only, in the order of this coordinate.

        Returns:
            All such groups. Every process is in one of them.
        """
        found: dict[Place, list[int]] = {}
        for rank in range(self.world):
            place = self.place(rank)
            origin = Place(**{**vars(place), axis: 0})
            found.setdefault(origin, []).append(rank)
        return list(found.values())


def norm_groups(spec: RunSpec) -> list[list[int]]:
    """The processes whose batch norms share the statistics of their images.

    Of d copies and v virtual ranks, d / v neighbouring copies share them; none do where v >= d.

    Returns:
        All such groups. Every process is in one of them.
    """
    size = max(1, spec.parallel.data // spec.batch_norm.virtual_ranks)
    axis = Degrees.of(spec).groups("data")
    return [group[i : i + size] for group in axis for i in range(0, len(group), size)]


def check_supported(spec: RunSpec, backend: str, supported: Collection[str]) -> None:
    """Checks that a backend can divide a run as the spec asks.

    Args:
        backend: its name, for the message.
        supported: the keys of the section ``parallel`` that it implements.

    Raises:
        UserError: another key has not its default value.
    """
    default = type(spec.parallel)()
    for key, value in spec.parallel:
        usual = getattr(default, key)
        if key not in supported and value != usual:
            raise UserError(
                f"parallel.{key}: {str(value).lower()}: {backend} does not support it in this "
                f"version; set it to {str(usual).lower()}"
            )


def check_world(spec: RunSpec, world: int) -> None:
    """Checks the number of processes.

    Args:
        world: number of processes that run.

    Raises:
        UserError: the degrees multiply to another number.
    """
    degrees = Degrees.of(spec)
    if degrees.world != world:
        raise UserError(
            f"parallel: data {degrees.data} x tensor {degrees.tensor} x pipeline "
            f"{degrees.pipeline} = {degrees.world}, but the number of processes is {world}; they "
            "must be equal"
        )
