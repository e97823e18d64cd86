"""The operations of a run whose networks compute in 16 bits.

Shape letters: N images, L tokens, D width, K words.
"""

from typing import Any, cast

import torch
from torch import Tensor

from triptych.backends.torch import ops
from triptych.core.contracts import Ops


class MixedOps:
    """Implements ``core.contracts.Ops``: the functions of ``ops``, but for the codes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ops, name)

    def soft_assign(self, x: Tensor, words: Tensor, sharpness: Tensor, /) -> tuple[Tensor, Tensor]:
        """See ``core.contracts.Ops``."""
        if not _serves(x):
            return ops.soft_assign(x, words, sharpness)
        return ops.soft_assign(x, words, sharpness, product=_product)


def operations(*, mixed: bool) -> Ops:
    """The operations of a run.

    Args:
        mixed: whether its networks compute in 16 bits.
    """
    return cast(Ops, MixedOps()) if mixed else ops


def _serves(x: Tensor) -> bool:
    """Whether products of bfloat16 have a float32 result there, and are the faster ones.

    Three of them take less time than one of float32 on GPUs that compute in bfloat16, and more on
    CPUs.
    """
    return (
        x.is_cuda
        and torch.version.hip is None
        and "dtype" in torch.ops.aten.mm.overloads()  # since PyTorch 2.8
        and torch.cuda.is_bf16_supported(including_emulation=False)
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of rows. Their errors are at most 2**-14 of the product of the lengths.

    A float32 number is the sum of two bfloat16 numbers to 2**-16 of it. Of the products of such
    parts, that of both low ones is as small, and left out. The other three are one longer product,
    which adds in float32: its result, which is large, is written once.

    Args:
        a: (N, L, D), float32.
        b: (K, D), float32.

    Returns:
        (N, L, K), float32.
    """
    high, low = _parts(a.flatten(0, 1))
    rows = torch.cat([high, high, low], dim=1)
    high, low = _parts(b)
    columns = torch.cat([high, low, high], dim=1)
    return torch.mm(rows, columns.mT, out_dtype=a.dtype).unflatten(0, a.shape[:2])


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 number that is next to each number, and the one next to the rest."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()
