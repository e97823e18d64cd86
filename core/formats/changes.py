"""How the values of a tensor differ between a file and the canonical form."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from triptych.core.contracts import Array
from triptych.core.errors import UserError
from triptych.core.files.tree import Malformed, Stored

Facts = Mapping[str, Any]
"""What is known about a model beside its shapes: keys of the spec, such as "model.heads"."""


class Change(Protocol):
    """A rearrangement of values that can be undone. No value is computed.

    Attributes:
        name: the past participle that a report shows, "" if the values stay as they are.
    """

    name: str

    def to_canonical(self, parts: Sequence[Stored], facts: Facts, /) -> Stored:
        """The canonical tensor.

        Args:
            parts: the tensors of the file, one for each name of the rule.
            facts: of the model.

        Raises:
            Malformed: the parts have other shapes than this change expects.
        """

    def from_canonical(self, tensor: Stored, facts: Facts, /) -> list[Stored]:
        """The parts, in the order of the rule's names."""


class Same:
    """The tensors are equal."""

    name = ""

    def to_canonical(self, parts: Sequence[Stored], facts: Facts, /) -> Stored:
        """See ``Change``."""
        return parts[0]

    def from_canonical(self, tensor: Stored, facts: Facts, /) -> list[Stored]:
        """See ``Change``."""
        return [tensor]


class Transposed:
    """A matrix (in, out), as Paddle has it. The canonical one is (out, in)."""

    name = "transposed"

    def to_canonical(self, parts: Sequence[Stored], facts: Facts, /) -> Stored:
        """See ``Change``."""
        return _transposed(parts[0])

    def from_canonical(self, tensor: Stored, facts: Facts, /) -> list[Stored]:
        """See ``Change``."""
        return [_transposed(tensor)]


class Matrices(Transposed):
    """The weights of a head in Paddle: matrices (in, out), and the gains of norms as they are."""

    def to_canonical(self, parts: Sequence[Stored], facts: Facts, /) -> Stored:
        """See ``Change``."""
        return parts[0] if len(parts[0].shape) == 1 else super().to_canonical(parts, facts)

    def from_canonical(self, tensor: Stored, facts: Facts, /) -> list[Stored]:
        """See ``Change``."""
        return [tensor] if len(tensor.shape) == 1 else super().from_canonical(tensor, facts)


class Reshaped:
    """Equal values in another shape. The canonical shape is that of a scalar.

    Args:
        shape: of the tensor in the file.
        dtype: of the tensor in the file; "": that of the canonical one. A count that the file
            holds as a float is an integer in the canonical form.
    """

    name = "reshaped"

    def __init__(self, shape: tuple[int, ...], dtype: str = "") -> None:
        """A scalar with this shape in the file."""
        self._shape, self._dtype = shape, dtype

    def to_canonical(self, parts: Sequence[Stored], facts: Facts, /) -> Stored:
        """See ``Change``. A tensor of another shape, or a fraction, stays for ``checks``."""
        tensor = parts[0]
        if tensor.shape != self._shape:
            return tensor
        if not self._dtype:
            return tensor.changed((), lambda bits: bits.reshape(()))
        value = tensor.array().reshape(())
        whole = np.isfinite(value) and float(value).is_integer()
        return Stored.of(np.asarray(value.astype(np.int64) if whole else value))

    def from_canonical(self, tensor: Stored, facts: Facts, /) -> list[Stored]:
        """See ``Change``."""
        if not self._dtype:
            return [tensor.changed(self._shape, lambda bits: bits.reshape(self._shape))]
        values: Array = tensor.array().reshape(self._shape).astype(self._dtype)
        return [Stored.of(values)]


class Joined:
    """Several tensors of the file, one below the other along the first axis.

    Args:
        count: number of tensors. They have equal shapes.
    """

    name = "joined"

    def __init__(self, count: int) -> None:
        """A change of this number of tensors."""
        self._count = count

    def to_canonical(self, parts: Sequence[Stored], facts: Facts, /) -> Stored:
        """See ``Change``."""
        first = parts[0]
        if any((p.shape, p.dtype) != (first.shape, first.dtype) for p in parts) or not first.shape:
            shapes = ", ".join(str(part.shape) for part in parts)
            raise Malformed(f"expected {self._count} tensors of one shape and type, got {shapes}")
        shape = (self._count * first.shape[0], *first.shape[1:])

        def verify() -> None:
            for part in parts:
                part.verify()

        def bits() -> Array:
            return np.concatenate([part.bits() for part in parts])

        return Stored(first.dtype, shape, bits, verify=verify)

    def from_canonical(self, tensor: Stored, facts: Facts, /) -> list[Stored]:
        """See ``Change``."""
        rows = tensor.shape[0] // self._count
        shape = (rows, *tensor.shape[1:])
        return [tensor.changed(shape, _slice(i * rows, rows)) for i in range(self._count)]


class Interleaved:
    """Rows of query, key and value head by head, as Megatron and LiBai store them.

    The rows of the file are (heads, 3, width of a head), those of the canonical tensor
    (3, heads, width of a head).
    """

    name = "permuted"

    def to_canonical(self, parts: Sequence[Stored], facts: Facts, /) -> Stored:
        """See ``Change``."""
        heads = _heads(parts[0], facts)
        return parts[0].changed(parts[0].shape, lambda bits: _swapped(bits, heads, 3))

    def from_canonical(self, tensor: Stored, facts: Facts, /) -> list[Stored]:
        """See ``Change``."""
        heads = _heads(tensor, facts)
        return [tensor.changed(tensor.shape, lambda bits: _swapped(bits, 3, heads))]


SAME, TRANSPOSED, MATRICES, INTERLEAVED = Same(), Transposed(), Matrices(), Interleaved()
VECTOR = Reshaped((1,))
"""A scalar that the file holds as a vector of length 1."""


def _transposed(tensor: Stored) -> Stored:
    if len(tensor.shape) != 2:
        raise Malformed(f"expected a matrix, got the shape {tensor.shape}")
    return tensor.changed(tensor.shape[::-1], np.transpose)


def _slice(start: int, rows: int) -> Callable[[Array], Array]:
    return lambda bits: bits[start : start + rows]


def _heads(tensor: Stored, facts: Facts) -> int:
    heads = facts.get("model.heads")
    if not isinstance(heads, int) or heads < 1:
        raise UserError(
            "model.heads: rows of query, key and value are stored head by head, and the file does "
            "not say the number of heads; give -c SPEC or -o model.heads=NUMBER"
        )
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        raise UserError(f"model.heads: {heads}: expected an integer > 0")
    if not tensor.shape or tensor.shape[0] % (3 * heads):
        raise Malformed(f"the rows of {tensor.shape} are no multiple of 3 * {heads} heads")
    return heads


def _swapped(bits: Array, outer: int, inner: int) -> Array:
    """Exchanges two nested counts in the order of the rows."""
    rows, *rest = bits.shape
    blocks = bits.reshape(outer, inner, rows // (outer * inner), *rest)
    return np.swapaxes(blocks, 0, 1).reshape(bits.shape)
