"""The queue of keys of MoCo v1 and v2, and the codebook of MOCA."""

from collections.abc import Sequence

import paddle
from paddle import Tensor, nn

from triptych.core.config.spec import QueueSpec, RunSpec
from triptych.core.methods import ring


class Queue(nn.Layer):
    """``core.contracts.Memory``. The pointer is a number of the host: nothing waits for it."""

    counters = ("pointer",)

    def __init__(self, spec: QueueSpec) -> None:
        super().__init__()
        self.register_buffer("queue", paddle.zeros([spec.output_dim, spec.queue_size]))
        self.pointer = 0

    @paddle.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """See ``core.contracts.Memory``."""
        size = self.queue.shape[1]
        for columns, rows in ring.segments(self.pointer, len(keys), size):
            self.queue[:, columns] = keys[rows].T
        self.pointer = ring.advance(self.pointer, len(keys), size)


class Codebook(nn.Layer):
    """``core.contracts.Codebook``. Pointer and count are numbers of the host."""

    counters = ("pointer", "updates")

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        self.register_buffer("words", paddle.zeros([spec.method.words, spec.model.width]))
        self.register_buffer("distance", paddle.zeros([1]))
        self.register_buffer("distance_used", paddle.zeros([1]))
        self.pointer = self.updates = 0

    @paddle.no_grad()
    def update(self, words: Tensor, differences: Sequence[Tensor]) -> None:
        """See ``core.contracts.Codebook``."""
        size = len(self.words)
        for rows, new in ring.segments(self.pointer, len(words), size):
            self.words[rows] = words[new]
        distance = self.distance
        for difference in differences:
            distance = ring.moved(distance, difference)
        paddle.assign(distance, self.distance)
        paddle.assign(distance, self.distance_used)
        self.pointer = ring.advance(self.pointer, len(words), size)
        self.updates += 1
