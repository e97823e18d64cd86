"""The queue of keys of MoCo v1 and v2."""

import oneflow as flow
from oneflow import Tensor, nn

from triptych.core import memory
from triptych.core.config.spec import QueueSpec


class Queue(nn.Module):
    """``core.engine.Memory``. The pointer is a number of the host, so that nothing waits for it."""

    def __init__(self, spec: QueueSpec) -> None:
        super().__init__()
        self.register_buffer("queue", flow.zeros(spec.output_dim, spec.queue_size))
        self.pointer = 0

    @flow.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """See ``core.engine.Memory``.

        Not before the backward pass: OneFlow would then give wrong gradients, without a word.
        """
        size = self.queue.shape[1]
        for columns, rows in memory.segments(self.pointer, len(keys), size):
            self.queue[:, columns] = keys[rows].transpose(0, 1)
        self.pointer = memory.advance(self.pointer, len(keys), size)
