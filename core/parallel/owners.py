"""Which copy of the model updates which tensors, if the copies share the optimizer's state.

Each tensor belongs to one copy as a whole, so that norms of tensors need no exchange. This is the
first stage of ZeRO (arXiv 1910.02054).
"""

from collections.abc import Mapping


def owners(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The copy, from 0, that each tensor belongs to.

    The tensors, the largest first, go to the copy that has the fewest numbers so far.

    Args:
        sizes: name -> number of numbers, equal on all copies.
        count: number of copies.
    """
    loads = [0] * count
    chosen: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        copy = loads.index(min(loads))
        chosen[name] = copy
        loads[copy] += sizes[name]
    return {name: chosen[name] for name in sizes}
