"""The queue of keys of MoCo v1 and v2, and the codebook of MOCA."""

import paddle
from paddle import nn

from triptych.core.config.spec import MocaSpec, QueueSpec, VitSpec
from triptych.core.methods import ring


class Queue(ring.Queue, nn.Layer):
    """Implements ``core.contracts.Memory``."""

    def __init__(self, spec: QueueSpec) -> None:
        super().__init__()
        self.register_buffer("queue", paddle.zeros([spec.output_dim, spec.queue_size]))


class Codebook(ring.Codebook, nn.Layer):
    """Implements ``core.contracts.Codebook``."""

    def __init__(self, model: VitSpec, method: MocaSpec) -> None:
        super().__init__()
        self.register_buffer("words", paddle.zeros([method.words, model.width]))
        self.register_buffer("distance", paddle.zeros([1]))
        self.register_buffer("distance_used", paddle.zeros([1]))
