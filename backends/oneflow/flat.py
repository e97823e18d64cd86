"""Tensors side by side in one buffer: what is done to all of them is then one operation."""

from collections.abc import Iterable, Mapping

import oneflow as flow
from oneflow import Tensor, nn

BLOCK = 1 << 20
"""Values that an update takes at once, so that what it computes on the way stays small."""


def pack(root: nn.Module, names: Iterable[str]) -> Tensor:
    """Moves parameters into one new buffer, of which each becomes a view.

    To be done on their final device and in their final precision: ``Module.to`` would take them
    out again. The parameters are new objects.

    Args:
        root: the module that holds them.
        names: their paths in it, in the order of the buffer.

    Returns:
        The buffer, 1-d; what is done to it in place is done to the parameters.
    """
    named = dict(root.named_parameters())
    chosen = {name: named[name] for name in names}
    buffer = flow.cat([parameter.detach().reshape(-1) for parameter in chosen.values()])
    for name, view in split(buffer, chosen).items():
        view.requires_grad_(chosen[name].requires_grad)
        # nn.Parameter(view) and parameter.data = view forget where the view begins: a reshape, a
        # slice or an expand of the parameter would read from the start of the buffer.
        view.__class__ = nn.Parameter
        path, _, attribute = name.rpartition(".")
        setattr(dict(root.named_modules())[path], attribute, view)
    return buffer


@flow.no_grad()
def split(buffer: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of a packed buffer, with the names and shapes of ``like``, in its order."""
    views, start = {}, 0
    for name, tensor in like.items():
        views[name] = buffer[start : start + tensor.numel()].reshape(*tensor.shape)
        start += tensor.numel()
    return views


@flow.no_grad()
def blocks(buffer: Tensor) -> list[Tensor]:
    """Views of a packed buffer, ``BLOCK`` values each, the last one fewer.

    The buffer may be a view, too, but not a detached one: ``detach`` forgets where it begins.
    """
    return [buffer[start : start + BLOCK] for start in range(0, buffer.numel(), BLOCK)]
