"""Matrix products of float32 on the CPU, in NumPy where it has faster kernels than OneFlow.

OneFlow's OpenBLAS has no kernels for AVX-512. That of NumPy has (see ``core.machine.blas``).

Shape letters: N rows, D and O columns.
"""

from functools import cache
from typing import Any

import numpy as np
import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn
from threadpoolctl import threadpool_info

from triptych.backends.oneflow import kernels
from triptych.backends.oneflow.kernels import quiet
from triptych.core.contracts import Array

CORES = ("SkylakeX", "Cooperlake", "SapphireRapids")
"""OpenBLAS's names of its kernels for AVX-512."""


@cache
def serve() -> bool:
    """Whether NumPy's products of float32 are faster than OneFlow's."""
    return any(library.get("architecture") in CORES for library in threadpool_info())


def in_float32(x: Tensor) -> bool:
    """Whether to compute with NumPy what is made of products of ``x``."""
    return x.dtype == flow.float32 and not x.is_cuda and serve()


def matmul(a: Tensor, b: Tensor, *, transpose_b: bool = False) -> Tensor:
    """The product of the last two dimensions. (..., N, D), (..., D, O) -> (..., N, O).

    Args:
        transpose_b: whether ``b`` is (..., O, D).
    """
    if not in_float32(a):
        return flow.matmul(a, b, transpose_b=transpose_b)
    if _recorded(a, b):
        return _product(transpose_b).apply(a, b)
    return flow.from_numpy(_multiplied(a.numpy(), b.numpy(), transpose_b=transpose_b))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``. (..., D), (O, D), (O,) -> (..., O)."""
    if not in_float32(x):
        return F.linear(x, weight, bias)
    given = [] if bias is None else [bias]
    if _recorded(x, weight, *given):
        return _linear(x.requires_grad, weight.requires_grad).apply(x, weight, *given)
    return flow.from_numpy(kernels.mapped(*(each.numpy() for each in (x, weight, *given))))


class Linear(nn.Linear):
    """OneFlow's linear layer, computed by ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., O)."""
        return linear(x, self.weight, self.bias)


def _recorded(*tensors: Tensor) -> bool:
    """Whether an operation on tensors is recorded for the backward pass."""
    return flow.is_grad_enabled() and any(x.requires_grad for x in tensors)


@quiet
def _multiplied(a: Array, b: Array, *, transpose_a: bool = False, transpose_b: bool) -> Array:
    a, b = (x.swapaxes(-1, -2) if flag else x for x, flag in ((a, transpose_a), (b, transpose_b)))
    return np.matmul(a, b)


@cache
def _product(transpose_b: bool) -> type[flow.autograd.Function]:
    class Product(flow.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return flow.from_numpy(_multiplied(a.numpy(), b.numpy(), transpose_b=transpose_b))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            a, b = (saved.numpy() for saved in ctx.saved_tensors)
            given = grad.numpy()
            of_a = _multiplied(given, b, transpose_b=not transpose_b)
            factors = (given, a) if transpose_b else (a, given)
            of_b = _multiplied(*factors, transpose_a=True, transpose_b=False)
            return flow.from_numpy(of_a), flow.from_numpy(of_b)

    return Product


@cache
def _linear(of_x: bool, of_weight: bool) -> type[flow.autograd.Function]:
    """A linear map. The flags say whether x, and weight with bias, get gradients."""

    class LinearMap(flow.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight, *bias)
            return flow.from_numpy(kernels.mapped(*(each.numpy() for each in (x, weight, *bias))))

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            x, weight, *bias = (saved.numpy() for saved in ctx.saved_tensors)
            given = kernels.as_rows(grad.numpy())
            of_input = kernels.from_outputs(given, weight).reshape(x.shape) if of_x else None
            of_others = kernels.of_weights(given, kernels.as_rows(x)) if of_weight else (None, None)
            found = [of_input, *of_others[: 1 + len(bias)]]
            return tuple(None if array is None else flow.from_numpy(array) for array in found)

    return LinearMap
