"""The queue of keys of MoCo v1 and v2, and the codebook of MOCA."""

from collections.abc import Sequence

import oneflow as flow
from oneflow import Tensor, nn

from triptych.core.config.spec import QueueSpec, RunSpec
from triptych.core.methods import ring


class Queue(nn.Module):
    """``core.contracts.Memory``. The pointer is a number of the host: nothing waits for it."""

    counters = ("pointer",)

    def __init__(self, spec: QueueSpec) -> None:
        super().__init__()
        self.register_buffer("queue", flow.zeros(spec.output_dim, spec.queue_size))
        self.pointer = 0

    @flow.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """See ``core.contracts.Memory``.

        Not before the backward pass: OneFlow would then give wrong gradients, without a word.
        """
        size = self.queue.shape[1]
        for columns, rows in ring.segments(self.pointer, len(keys), size):
            self.queue[:, columns] = keys[rows].transpose(0, 1)
        self.pointer = ring.advance(self.pointer, len(keys), size)


class Codebook(nn.Module):
    """``core.contracts.Codebook``. Pointer and count are numbers of the host."""

    counters = ("pointer", "updates")

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        self.register_buffer("words", flow.zeros(spec.method.words, spec.model.width))
        self.register_buffer("distance", flow.zeros(1))
        self.register_buffer("distance_used", flow.zeros(1))
        self.pointer = self.updates = 0

    @flow.no_grad()
    def update(self, words: Tensor, differences: Sequence[Tensor]) -> None:
        """See ``core.contracts.Codebook``."""
        size = len(self.words)
        for rows, new in ring.segments(self.pointer, len(words), size):
            self.words[rows] = words[new]
        distance = self.distance
        for difference in differences:
            distance = ring.moved(distance, difference)
        self.distance.copy_(distance)
        self.distance_used.copy_(distance)
        self.pointer = ring.advance(self.pointer, len(words), size)
        self.updates += 1
