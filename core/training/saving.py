"""The state of an engine on its way to a file, one tensor after the other.

So no process holds a second copy of the model, unless the spec asks for it: a copy is written while
the run goes on. Where processes share tensors, each of them reads all slots in the same order, and
the main one writes.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from triptych.core.checkpoint.store import file_order
from triptych.core.contracts import Array, Ranks
from triptych.core.engine import Engine
from triptych.core.files.tree import Stored
from triptych.core.parallel.agreement import together


def divided(engine: Engine) -> bool:
    """Whether one process alone cannot read the state of the run."""
    ranks, section = engine.ranks, engine.spec.parallel
    shares = section.shard_optimizer and ranks.replicas.count > 1
    return ranks.tensor.count * ranks.pipeline.count > 1 or shares


class Types:
    """The types of a state's tensors, which a file states before it holds the values.

    They never change, so the slots are read once for them.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, str] = {}

    def of(self, names: list[str]) -> Mapping[str, str]:
        """Name -> NumPy's name of the type, at least for ``names``, which stand in file order."""
        slots = self._engine.slots()
        for name in names:
            if name not in self._known:
                self._known[name] = slots[name].read().dtype.name
        return self._known


class Streamed:
    """One reading of all slots of an engine, in the order of a checkpoint's files.

    Args:
        engine: whose state is read.
        types: of its tensors.
    """

    def __init__(self, engine: Engine, types: Types) -> None:
        self._slots = engine.slots()
        self._unread = file_order(self._slots)
        self._divided = divided(engine)
        self._types = types.of(list(self._unread)) if self._reads(engine.ranks) else {}

    def tensors(self) -> dict[str, Stored]:
        """Each tensor by name. It is read when its values are asked for, once and in order."""
        return {
            name: Stored(
                self._types[name], tuple(self._slots[name].shape), partial(self._read, name)
            )
            for name in self._unread
        }

    def _reads(self, ranks: Ranks) -> bool:
        return self._divided or ranks.is_main

    @contextmanager
    def by_all(self) -> Iterator[None]:
        """At the end of the block, reads what nobody has asked for, if other processes read it."""
        try:
            yield
        finally:
            while self._divided and self._unread:
                self._read(self._unread[0])

    def _read(self, name: str) -> Array:
        if self._unread[0] != name:
            raise RuntimeError(f"{name} is read before {self._unread[0]}")
        del self._unread[0]
        return self._slots[name].read()


class Background:
    """The checkpoint that is written while the run goes on, if there is one.

    A run that ends waits for it, unless it is killed: then the checkpoint does not appear.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._pool = ranks, ThreadPoolExecutor(1, "checkpoint")
        self._path: Path | None = None
        self._written: Future[object] | None = None

    def begin(self, path: Path, write: Callable[[], object]) -> None:
        """The main process has a checkpoint written. All processes know its path."""
        self._path = path
        self._written = self._pool.submit(write) if self._ranks.is_main else None

    def close(self) -> None:
        """Waits for the checkpoint, in this process alone, whether it can be written or not."""
        self._pool.shutdown()

    def finish(self) -> Path | None:
        """Waits for the checkpoint, in all processes. Returns its path, or None without one.

        Raises:
            NonFiniteError, UserError: as in ``checkpoint.write``.
        """
        path, self._path = self._path, None
        if path:
            with together(self._ranks):
                if self._written:
                    self._written.result()
        return path
