"""Matrix products of float32 by oneDNN on AMD's processors with AVX-512.

There, PyTorch's MKL does not use the wide units and reaches less than half of oneDNN's rate. The
two add in another order, so the choice changes the last bits of a run's numbers. It depends on the
processor alone, not on a measurement, so a resumed run makes the same choice.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from triptych.core.machine.resources import processor

SMALLEST = 1 << 22
"""Multiplications from which a product is worth a call from Python, which takes some 40 us."""
LONG, LARGE = 1024, 1 << 21
"""A row of more than ``LONG`` numbers takes more than a page of memory, and a matrix of ``LARGE``
numbers more than a core's cache."""
COLUMNS = 384
"""Columns that oneDNN takes at once of a large matrix with long rows. It walks down the columns,
through as many pages as there are rows, and would take up to three times as long."""

_kernels: list[torch.library.Library] = []
"""The registration of the kernels. It lasts as long as the process."""
_active = False


def serve() -> bool:
    """Whether oneDNN's products are the faster ones on this machine, and this PyTorch has them."""
    return processor() >= {"AuthenticAMD", "avx512f"} and _available()


def choose(*, onednn: bool) -> None:
    """Sets by what this process computes matrix products of float32: linear layers, both passes."""
    global _active
    _active = onednn
    if onednn and not _kernels:
        library = torch.library.Library("aten", "IMPL")
        library.impl("mm", _mm, "CPU")
        library.impl("addmm", _addmm, "CPU")
        _kernels.append(library)


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Products as without ``choose``: for loops to compare with. Also a decorator."""
    before = _active
    choose(onednn=False)
    try:
        yield
    finally:
        choose(onednn=before)


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """(M, K), (K, N) -> (M, N)."""
    if _served(a, b):
        return _product(a, b)
    # The variants with a result to fill keep PyTorch's kernels.
    out: Tensor = torch.ops.aten.mm.out(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    return out


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """(N,) or a shape that broadcasts, (M, K), (K, N) -> (M, N)."""
    if _served(a, b) and beta == alpha == 1 and bias.shape == b.shape[1:]:
        return _linear(a, b, bias)
    out = a.new_empty(a.shape[0], b.shape[1])
    product: Tensor = torch.ops.aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out)
    return product


def _served(a: Tensor, b: Tensor) -> bool:
    size = a.shape[0] * a.shape[1] * b.shape[1]
    return _active and a.dtype == b.dtype == torch.float32 and size >= SMALLEST


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K), (K, N) -> (M, N)."""
    if a.shape[0] > b.shape[1] and not a.is_contiguous():
        # oneDNN copies a first operand whose rows are not contiguous: let it be the smaller one.
        return _product(b.t(), a.t()).t().contiguous()
    if not b.is_contiguous() or b.shape[1] <= LONG or b.numel() < LARGE:
        return _linear(a, b, None)
    a = a.contiguous()
    out = a.new_empty(a.shape[0], b.shape[1])
    for to, columns in zip(out.split(COLUMNS, 1), b.split(COLUMNS, 1), strict=True):
        to.copy_(_linear(a, columns.contiguous(), None))
    return out


def _linear(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return out
