"""Writes what a conversion planned, one tensor after the other, and whole or not at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from triptych.core import config
from triptych.core.checkpoint import store
from triptych.core.checkpoint.retrieval import MANIFEST
from triptych.core.contracts import Array
from triptych.core.errors import UserError, printable
from triptych.core.files import saving, zips
from triptych.core.files.hashing import Beside, beside
from triptych.core.files.tree import Malformed, Node, Stored, tensors
from triptych.core.formats import canonical, containers
from triptych.core.formats.conversion import Plan
from triptych.core.formats.format import Output
from triptych.core.formats.opening import SPEC
from triptych.core.methods.health import non_finite

HELD = 2**26
"""Bytes of mapped files that may stay in memory after they are used."""

Advance = Callable[[int], None]


def check(path: Path, source: Path, *, force: bool) -> None:
    """Refuses a destination that would lose something.

    Args:
        path: of the destination.
        source: of the file that is converted.
        force: whether an earlier file, or folder of weights, may be replaced.

    Raises:
        UserError: see above, or there is no folder to write in.
    """
    name = printable(str(path))
    if not path.parent.is_dir():
        raise UserError(f"{name}: there is no folder {printable(str(path.parent))}; make it first")
    refuse_loss(path, source, force=force, name=name, held="the file that is converted")
    if path.is_dir() and not _replaceable(path):
        raise UserError(
            f"{name}: a folder that holds no weights is never replaced; give another name"
        )


def refuse_loss(path: Path, source: Path | None, *, force: bool, name: str, held: str) -> None:
    """Raises UserError if a new file would replace an earlier one, or what it is made of.

    Args:
        path: of the new file or folder.
        source: what it is made of, if that is a file or folder.
        force: whether an earlier one may be replaced.
        name: of the new one in a message.
        held: what ``source`` is, in words.
    """
    if path.exists() and not force:
        raise UserError(f"{name}: exists; give another name, or --force to replace it")
    if path.exists() and source and source.resolve().is_relative_to(path.resolve()):
        raise UserError(f"{name}: holds {held}; give another name")


def _replaceable(folder: Path) -> bool:
    """Whether a folder is one that a conversion writes."""
    return (folder / MANIFEST).is_file() or containers.is_foreign_folder(folder)


def write(path: Path, made: Plan, advance: Advance) -> str:
    """Writes the target of a plan. An earlier file is replaced when the new one is whole.

    Args:
        path: of the file or folder. For canonical names the suffixes ``.safetensors`` and ``.npz``
            make one file; another name is the folder of a checkpoint.
        made: the plan.
        advance: called with the number of bytes that are done.

    Returns:
        The container.

    Raises:
        UserError: a value is not finite, the container cannot hold the tensors, or the disk is
            full. Nothing was replaced.
    """
    container, tree = _tree(path, made)
    with saving.whole(path) as aside, beside() as thread:
        # A checkpoint is hashed in a thread of its own, which is the slowest of its tasks.
        examine = _examine if container == "checkpoint" else partial(_beside, thread)
        watched = _watched(tree, _Watch(advance, examine))
        with _damage_of(made):
            if container == "checkpoint":
                extra = {
                    "format": made.source.format.name,
                    "layout": made.source.layout.about,
                }
                store.fill_alone(aside, made.step or 0, watched, made.spec, {"converted": extra})
            else:
                saving.WRITERS[container](aside, watched)
            thread.finish()
    return container


def examine(made: Plan) -> None:
    """Looks at all values as ``write`` does, without writing them.

    Raises:
        UserError: as in ``write``, of a value or a checksum.
    """
    with _damage_of(made):
        for name, tensor in {**made.written, **made.optimizer}.items():
            _examine(name, tensor, tensor.bits())


@contextmanager
def _damage_of(made: Plan) -> Iterator[None]:
    """Names the file whose content is not what was written."""
    try:
        yield
    except Malformed as error:
        raise UserError(f"{printable(str(made.source.content.path))}: {error}") from error


def total(path: Path, made: Plan) -> int:
    """Bytes of all tensors that ``write`` writes."""
    return sum(tensor.nbytes for _, tensor in tensors(_tree(path, made)[1]))


def _tree(path: Path, made: Plan) -> tuple[str, Node]:
    """Container and content of the target."""
    flat = containers.ARRAYS.get(path.suffix)
    if made.target is canonical.FORMAT:
        return flat or "checkpoint", {**made.written, **made.optimizer}
    if made.target.output is None:
        raise UserError(f"--to {made.target.name}: {made.target.about} is only read")
    output = Output(
        made.choice.layout,
        made.written,
        made.optimizer,
        made.spec,
        made.step,
        made.epoch,
        folder=not path.suffix,
    )
    container, tree = made.target.output(output)
    if made.own:
        tree = {SPEC: config.dump(made.spec), **tree}
    if flat and all(isinstance(value, Stored) for value in tree.values()):
        return flat, tree
    return container, tree


class _Watch:
    """Looks after the tensors while they are written, in their order."""

    def __init__(self, advance: Advance, examine: Callable[[str, Stored, Array], None]) -> None:
        self._advance, self._examine = advance, examine
        self._done, self._held = 0, 0
        self._known: dict[int, Stored] = {}

    def __call__(self, name: str, tensor: Stored) -> Stored:
        """The same tensor, which reports when its values are used."""
        if id(tensor) not in self._known:
            self._known[id(tensor)] = replace(tensor, bits=lambda: self._bits(name, tensor))
        return self._known[id(tensor)]

    def _bits(self, name: str, tensor: Stored) -> Array:
        if self._held > HELD:
            zips.release()
            self._held = 0
        bits = tensor.bits()
        self._examine(name, tensor, bits)
        self._done += tensor.nbytes
        self._held += tensor.nbytes
        self._advance(self._done)
        return bits


def _beside(thread: Beside, name: str, tensor: Stored, bits: Array) -> None:
    """Looks at a tensor in another thread."""
    thread.call(_examine, name, tensor, bits, size=tensor.nbytes)


def _examine(name: str, tensor: Stored, bits: Array) -> None:
    """Refuses values that are not finite, or not those that were saved."""
    tensor.verify()
    values = bits if tensor.dtype != "bfloat16" else tensor.array()
    if count := non_finite(values):
        raise UserError(f"{name}: {count} of {values.size} values are not finite")


def _watched(node: Node, watch: _Watch, name: str = "") -> Node:
    """The tree with watched tensors."""
    if isinstance(node, Stored):
        return watch(name, node)
    if isinstance(node, dict):
        return {k: _watched(v, watch, f"{name}.{k}" if name else str(k)) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(_watched(value, watch, name) for value in node)
    return node
