"""The queue of keys of MoCo v1 and v2, and the codebook of MOCA."""

import oneflow as flow
from oneflow import Tensor, nn

from triptych.core.config.spec import MocaSpec, QueueSpec, VitSpec
from triptych.core.methods import ring


class Queue(nn.Module):
    """``core.contracts.Memory``. The pointer is a number of the host: nothing waits for it."""

    counters = ("pointer",)
    enqueue = ring.enqueue
    queue: Tensor

    def __init__(self, spec: QueueSpec) -> None:
        super().__init__()
        self.register_buffer("queue", flow.zeros(spec.output_dim, spec.queue_size))
        self.pointer = 0


class Codebook(nn.Module):
    """``core.contracts.Codebook``. Pointer and count are numbers of the host."""

    counters = ("pointer", "updates")
    update = ring.update
    words: Tensor
    distance: Tensor
    distance_used: Tensor

    def __init__(self, model: VitSpec, method: MocaSpec) -> None:
        super().__init__()
        self.register_buffer("words", flow.zeros(method.words, model.width))
        self.register_buffer("distance", flow.zeros(1))
        self.register_buffer("distance_used", flow.zeros(1))
        self.pointer = self.updates = 0
