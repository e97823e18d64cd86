"""How the processes of a run share an evaluation: each takes some of the batches.

Everything else is done on all of them alike, on the features of all images.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from io import BytesIO

import numpy as np

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import ALONE, Array, evenly
from triptych.core.data import Source, nothing_readable, shared_batches
from triptych.core.engine import Engine
from triptych.core.parallel.agreement import part

BATCH = 256
"""Number of images embedded at once."""
Compute = Callable[[Array, Array], Sequence[Array]]


@dataclass
class Met:
    """What was met on reading some images.

    Attributes:
        skipped: names of the damaged files, which were left out.
        warned: file name -> text of an image library's warning about it.
        digest: as in ``Labelled``.
    """

    skipped: list[str] = field(default_factory=list)
    warned: dict[str, str] = field(default_factory=dict)
    digest: str = ""


class Sharing:
    """The copies of a model that share an evaluation.

    Args:
        engine: of the run; None: this process evaluates alone.

    Attributes:
        rank: number of this copy.
        count: number of copies.
    """

    def __init__(self, engine: Engine | None = None) -> None:
        self._engine = engine
        self._ranks = ALONE if engine is None else engine.ranks
        self.rank, self.count = self._ranks.replicas.rank, self._ranks.replicas.count

    def part(self) -> AbstractContextManager[None]:
        """If the block fails on one process, it raises on all of them."""
        return part(self._ranks)

    def any(self, flag: bool) -> bool:
        """Whether the flag of at least one process is set. The call waits for all of them."""
        return self._ranks.any(flag)

    def gather(self, arrays: Sequence[Array]) -> list[list[Array]]:
        """The arrays of each copy, in the order of the copies. They may differ in number and shape.

        They arrive bit by bit, whatever the precision of the run is.
        """
        if self.count == 1:
            return [list(arrays)]
        memory = BytesIO()
        np.savez(memory, *arrays)
        received = []
        for content in self._bytes(memory.getvalue()):
            with np.load(BytesIO(content), allow_pickle=False) as file:
                received.append([file[name] for name in file.files])
        return received

    def texts(self, text: str) -> list[str]:
        """The texts of all copies, in their order."""
        if self.count == 1:
            return [text]
        return [content.decode() for content in self._bytes(text.encode())]

    def _bytes(self, content: bytes) -> list[bytes]:
        lengths = self._integers(np.array([len(content)], np.int64))
        padded = np.zeros(-(-int(lengths.max()) // 8) * 8, np.uint8)
        padded[: len(content)] = np.frombuffer(content, np.uint8)
        rows = self._integers(padded.view(np.int64)).reshape(self.count, -1)
        pairs = zip(rows, lengths, strict=True)
        return [row.tobytes()[: int(length)] for row, length in pairs]

    def _integers(self, values: Array) -> Array:
        """(n,) int64 of each copy -> (count * n,)."""
        if self._engine is None:
            return values
        tensor = self._engine.replicas.gather(self._engine.tensor(values))
        return np.ascontiguousarray(self._engine.array(tensor), np.int64)

    def by_rows(self, rows: Array, compute: Callable[[Array], Sequence[Array]]) -> list[Array]:
        """What ``compute`` gives for all rows. Each copy computes some of them.

        Args:
            rows: (N, ...), the same on all copies.
            compute: (n, ...) -> arrays (n, ...). A result does not depend on the other rows.
        """
        own = rows[evenly(len(rows), self.rank, self.count)]
        with self.part():
            found = compute(own) if len(own) else []
        columns = zip(*filter(None, self.gather(found)), strict=True)
        return [np.concatenate(column) for column in columns]


def share_statistics(engine: Engine) -> None:
    """Gives the running statistics of the first copy of the model to all copies.

    A checkpoint has those of the first copy. Others differ where batch norms normalise the images
    of each copy separately.
    """
    if engine.replicas.count == 1:
        return
    for name, slot in engine.model_slots().items():
        if name.endswith((".running_mean", ".running_var")):
            values = engine.tensor(slot.read())
            engine.replicas.broadcast(values)
            slot.write(engine.array(values))


def shared(
    spec: RunSpec,
    source: Source,
    met: Met,
    compute: Compute,
    sharing: Sharing,
) -> Iterator[tuple[list[Array], Array]]:
    """What ``compute`` gives for the images of a source, batch by batch, and their positions (n,).

    The copies take turns: of each ``sharing.count`` batches each copy computes one.

    Args:
        met: is complete after the last batch, on all copies.
        compute: images (n, C, H, W), positions (n,) -> arrays.

    Raises:
        UserError: a file is damaged (see ``data.on_error``), no image can be read, or a worker
            died; or as ``compute``.
    """
    skipped, warned = list[str](), dict[str, str]()
    batches = shared_batches(spec, source, BATCH, sharing.rank, sharing.count, skipped, warned)
    count = 0
    for _ in range(-(-len(source) // (BATCH * sharing.count))):
        with sharing.part():
            images, index = next(batches, _NOTHING)
            found = [index, *compute(images, index)] if len(index) else []
        for one in sharing.gather(found):
            if one:
                count += len(one[0])
                yield one[1:], one[0]
    batches.close()
    for text in sharing.texts(json.dumps([skipped, warned])):
        names, texts = json.loads(text)
        met.skipped += names
        met.warned |= texts
    if met.skipped and not count:
        raise nothing_readable(source, met.skipped)


_NOTHING = (np.empty(0, np.float32), np.empty(0, np.int64))
