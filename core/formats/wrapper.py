"""The name prefix of a model that was saved inside a data-parallel wrapper."""

from triptych.core.contracts import State

WRAPPER = "module."


def unwrapped(arrays: State) -> State:
    """The arrays without the prefix, if all names have it."""
    prefix = WRAPPER if all(name.startswith(WRAPPER) for name in arrays) else ""
    return {name.removeprefix(prefix): array for name, array in arrays.items()}
