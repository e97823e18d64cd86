"""Proves that a linear probe left its encoder as it was."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from triptych.core.engine import Engine
from triptych.core.parameters import parts


def digest(engine: Engine) -> str | None:
    """SHA-256 over all tensors of a frozen encoder, hexadecimal; None if it is not frozen.

    The call is collective.
    """
    if not parts(engine.spec).frozen:
        return None
    total = hashlib.sha256()
    for name, slot in sorted(engine.model_slots().items()):
        if name.startswith("student.encoder."):
            total.update(name.encode())
            total.update(slot.read().tobytes())
    return total.hexdigest()


@contextmanager
def unchanged(engine: Engine) -> Iterator[str | None]:
    """Gives the encoder's digest, and compares it with that at the end of the block.

    Raises:
        RuntimeError: the frozen encoder has changed.
    """
    before = digest(engine)
    yield before
    if digest(engine) != before:
        raise RuntimeError("the frozen encoder is not what it was at the start of this run")
