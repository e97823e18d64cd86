"""Packs tensors into one buffer, so that one operation updates all of them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow import sums
from triptych.core.contracts import Array

BLOCK = 1 << 20
"""Number of values per update on the CPU. It bounds the temporary memory of the update."""


def pack(root: nn.Module, names: Iterable[str]) -> Tensor:
    """Moves parameters into one new buffer. Each is replaced by a new one, a view of the buffer.

    Call this on the final device and in the final precision: ``Module.to`` breaks the views.

    Args:
        root: the module of the parameters.
        names: the paths of the parameters in ``root``, in the order of the buffer. If there are
            none, as in a stage of a pipeline that trains nothing, the buffer has one zero.

    Returns:
        The buffer, 1-d. An operation on it in place changes the parameters.
    """
    named, modules = dict(root.named_parameters()), dict(root.named_modules())
    parameters = {name: named[name] for name in names}
    if not parameters:
        return next(iter(named.values())).new_zeros((1,))
    buffer = flow.cat([parameter.detach().reshape(-1) for parameter in parameters.values()])
    for name, view in split(buffer, parameters).items():
        view.requires_grad_(parameters[name].requires_grad)
        # nn.Parameter(view) and parameter.data = view lose the offset of the view: a reshape, a
        # slice or an expand of the parameter would read from the start of the buffer.
        view.__class__ = nn.Parameter
        path, _, attribute = name.rpartition(".")
        setattr(modules[path], attribute, view)
        if not buffer.is_cuda:
            packed = _Packed(view, view.numpy(), buffer)
            vars(modules[path]).setdefault(_PACKED, {})[attribute] = packed
    return buffer


class _Packed(NamedTuple):
    """A parameter on the CPU, its memory as an array, and the buffer that it is part of."""

    parameter: nn.Parameter
    array: Array
    buffer: Tensor


_PACKED = "_packed"
"""The attribute in which a module keeps what of its parameters is packed, by name."""


def arrays(modules: Iterable[nn.Module]) -> Iterator[dict[str, Array]]:
    """The parameters that modules on the CPU have themselves, as arrays that share their memory.

    The arrays hold what was written last. For that, this waits once for each buffer, and once for
    each parameter that is in none.
    """
    waited: set[int] = set()
    for module in modules:
        found = {}
        for name, parameter in module.named_parameters(recurse=False):
            packed = vars(module).get(_PACKED, {}).get(name)
            if packed is None or packed.parameter is not parameter:
                found[name] = parameter.numpy()
                continue
            if id(packed.buffer) not in waited:
                waited.add(id(packed.buffer))
                packed.buffer.numpy()
            found[name] = packed.array
        yield found


@flow.no_grad()
def split(buffer: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Views of a packed buffer with the names, shapes and order of ``like``."""
    views, start = {}, 0
    for name, tensor in like.items():
        views[name] = buffer[start : start + tensor.numel()].reshape(*tensor.shape)
        start += tensor.numel()
    return views


@flow.no_grad()
def blocks(buffer: Any) -> list[Any]:
    """Views of a packed buffer, a tensor or an array.

    On the CPU each has ``BLOCK`` values; the last one may have fewer. On a GPU there is one view,
    since to start the kernels of a block takes longer than they do.

    The buffer may be a view itself, but not a detached one: ``detach`` loses the view's offset.
    """
    whole = not isinstance(buffer, np.ndarray) and sums.plain_forms_serve(buffer)
    size = max(1, len(buffer)) if whole else BLOCK
    return [buffer[start : start + size] for start in range(0, len(buffer), size)]
