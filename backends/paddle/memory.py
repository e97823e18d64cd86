"""The queue of keys of MoCo v1 and v2, and the codebook of MOCA."""

import paddle
from paddle import Tensor, nn

from triptych.core.config.spec import MocaSpec, QueueSpec, VitSpec
from triptych.core.methods import ring


class Queue(nn.Layer):
    """``core.contracts.Memory``. The pointer is a number of the host: nothing waits for it."""

    counters = ("pointer",)
    enqueue = ring.enqueue
    queue: Tensor

    def __init__(self, spec: QueueSpec) -> None:
        super().__init__()
        self.register_buffer("queue", paddle.zeros([spec.output_dim, spec.queue_size]))
        self.pointer = 0


class Codebook(nn.Layer):
    """``core.contracts.Codebook``. Pointer and count are numbers of the host."""

    counters = ("pointer", "updates")
    update = ring.update
    words: Tensor
    distance: Tensor
    distance_used: Tensor

    def __init__(self, model: VitSpec, method: MocaSpec) -> None:
        super().__init__()
        self.register_buffer("words", paddle.zeros([method.words, model.width]))
        self.register_buffer("distance", paddle.zeros([1]))
        self.register_buffer("distance_used", paddle.zeros([1]))
        self.pointer = self.updates = 0
