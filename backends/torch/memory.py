"""The queue of keys of MoCo v1 and v2, and the codebook of MOCA."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from triptych.core.config.spec import QueueSpec, RunSpec
from triptych.core.methods import ring


class Queue(nn.Module):
    """``core.contracts.Memory``. The pointer is a number of the host: nothing waits for it."""

    counters = ("pointer",)

    def __init__(self, spec: QueueSpec) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(spec.output_dim, spec.queue_size))
        self.pointer = 0

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """See ``core.contracts.Memory``."""
        size = self.queue.shape[1]
        for columns, rows in ring.segments(self.pointer, len(keys), size):
            self.queue[:, columns] = keys[rows].mT
        self.pointer = ring.advance(self.pointer, len(keys), size)


class Codebook(nn.Module):
    """``core.contracts.Codebook``. Pointer and count are numbers of the host."""

    counters = ("pointer", "updates")

    def __init__(self, spec: RunSpec) -> None:
        super().__init__()
        self.register_buffer("words", torch.zeros(spec.method.words, spec.model.width))
        self.register_buffer("distance", torch.zeros(1))
        self.register_buffer("distance_used", torch.zeros(1))
        self.pointer = self.updates = 0

    @torch.no_grad()
    def update(self, words: Tensor, differences: Sequence[Tensor]) -> None:
        """See ``core.contracts.Codebook``."""
        size = len(self.words)
        for rows, new in ring.segments(self.pointer, len(words), size):
            self.words[rows] = words[new]
        for difference in differences:
            self.distance.copy_(ring.moved(self.distance, difference))
        self.distance_used.copy_(self.distance)
        self.pointer = ring.advance(self.pointer, len(words), size)
        self.updates += 1
