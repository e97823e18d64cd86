"""Counts what PyTorch would launch on a device, where there is none.

``on_cuda`` moves an engine to a GPU that is not there: its tensors have a device, a type and a
shape, and no values. Forward passes and optimizers run on them, with the rules of CUDA's autocast.
A backward pass needs a real device.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from triptych.core.contracts import Batch, Replicas, Step
from triptych.core.methods.accumulate import Accumulation

READS = ("_local_scalar_dense", "is_nonzero", "equal")
"""Operations whose result the host waits for."""
MAKES_MEMORY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
COPIES = ("_to_copy", "copy_")


class Launches(TorchDispatchMode):
    """Looks at the operations inside. Views, which launch nothing, are left out.

    Attributes:
        count: of each operation, by name.
        types: of the results of each operation on the GPU.
        copies: operations that read a tensor of the host and write one of the GPU.
        reads: operations that the host waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.types: dict[str, set[torch.dtype]] = defaultdict(set)
        self.copies: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """See ``TorchDispatchMode``."""
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in READS or (name in COPIES and _to_host(args, result)):
            self.reads.append(name)
        if _launches(function, name):
            self.count[name] += 1
        # What changes its arguments may return nothing.
        written = args if name.endswith("_") else result
        on_gpu = [x for x in _tensors(written) if x.device.type == "cuda"]
        self.types[name] |= {x.dtype for x in on_gpu}
        # A kernel takes a number of the host as an argument; that is no copy.
        host = [x for x in _tensors(args) if x.device.type == "cpu" and (x.ndim or name in COPIES)]
        if host and on_gpu:
            self.copies.append(name)
        return result


def _launches(function: Any, name: str) -> bool:
    views = [r.alias_info for r in function._schema.returns]
    is_view = any(info is not None and not info.is_write for info in views)
    return not is_view and name not in (*MAKES_MEMORY, "detach", "lift_fresh")


def _to_host(args: Any, result: Any) -> bool:
    sources = {x.device.type for x in _tensors(args)}
    return "cuda" in sources and any(x.device.type == "cpu" for x in _tensors(result))


def _tensors(values: Any) -> list[torch.Tensor]:
    items = values if isinstance(values, tuple | list) else [values]
    nested = [y for x in items for y in (x if isinstance(x, tuple | list) else [x])]
    return [x for x in nested if isinstance(x, torch.Tensor)]


def fuse_attention(engine: Any) -> None:
    """Attention by one kernel, as on a GPU. In bfloat16 the CPU takes its parts."""
    for module in engine.model.modules():
        if isinstance(module, Block):
            module.attn.fused_attn = True


@contextmanager
def on_cuda(engine: Any, monkeypatch: Any) -> Iterator[None]:
    """In the block the engine is on a GPU that is not there."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fuse_attention(engine)
        _move(engine, "cuda:0")
        yield


def _move(engine: Any, device: str) -> None:
    """``Module.to`` keeps parameters that hold values."""
    model = engine.model
    for module in model.modules():
        for name, tensor in module.named_parameters(recurse=False):
            new = torch.empty(tensor.shape, device=device, dtype=tensor.dtype)
            setattr(module, name, torch.nn.Parameter(new, tensor.requires_grad))
        for name, tensor in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(tensor.shape, device=device, dtype=tensor.dtype))
    model.follow()
    engine.context = replace(engine.context, device=device)
    engine.optimizer = engine._optimizer()


class _Forward:
    """Computes without a backward pass."""

    def differentiate_all(self, computes: Any) -> list[Any]:
        """See ``core.methods.accumulate.Autograd``."""
        return [compute() for compute in computes]


def step_of(engine: Any, draws: Any, hyper: Any) -> Step[Any, Any]:
    """A step of a single copy of the model."""
    return Step(engine.ops, engine.model, engine.spec.method, draws, hyper, Replicas())


def forward(engine: Any, step: Step[Any, Any], batch: Batch, parts: list[Batch]) -> Any:
    """One forward pass; the loss has no backward pass yet. batch, parts: of ``Engine._staged``."""
    return Accumulation(_Forward(), engine.method, step, batch, parts).differentiate()  # type: ignore[arg-type]
