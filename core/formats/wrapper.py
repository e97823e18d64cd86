"""The prefix of a model that was saved inside its data-parallel wrapper."""

from triptych.core.contracts import State

WRAPPER = "module."


def unwrapped(arrays: State) -> State:
    """Without the prefix, where all names have it."""
    prefix = WRAPPER if all(name.startswith(WRAPPER) for name in arrays) else ""
    return {name.removeprefix(prefix): array for name, array in arrays.items()}
