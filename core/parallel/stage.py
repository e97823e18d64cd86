"""The stage of a pipeline that a process has: which networks it keeps, and how it trains them.

All processes of a pipeline run the same step. Where a stage lacks the networks, zeros take the
place of their outputs, which nothing uses: the last stage has heads, loss and memory, and its
results replace those of the others. The order of the stages' work is that of
``core.parallel.pipeline``.

Shape letters: N images, T tokens, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple

from triptych.core import parameters
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Group, Outcome, Tensor
from triptych.core.parallel.pipeline import one_forward_one_backward, run
from triptych.core.parallel.stages import blocks_of

Layer = Callable[[Tensor], Tensor]


class Stage(ABC):
    """The blocks that this process has of an encoder, and its connections with the neighbours.

    Without gradients the tokens go from stage to stage as they are computed. With gradients
    ``differentiate`` receives and sends them: a network takes them from an inbox, and leaves its
    own in an outbox. A backend adds the native operations.

    Args:
        depth: number of blocks of all stages.
        group: the processes of the pipeline, in the order of their stages.
    """

    def __init__(self, depth: int, group: Group) -> None:
        self.stages, self.rank = group.count, group.rank
        self.blocks = blocks_of(depth, group.count)[group.rank]
        self.is_first, self.is_last = group.rank == 0, group.rank == group.count - 1
        self._inbox: Tensor = None
        self._taken = 0
        self._outbox: list[Tensor] = []
        self._size = 0

    # ----------------------------------------------------------------- native parts of a backend

    @abstractmethod
    def is_recording(self) -> bool:
        """Whether operations are recorded for the backward pass."""

    @abstractmethod
    def zeros(self, shape: Sequence[int], /) -> Tensor:
        """Zeros of the tokens' type, on their device."""

    @abstractmethod
    def join(self, tensors: Sequence[Tensor], /) -> Tensor:
        """The numbers of tensors, one tensor after the other. (number of all,)"""

    @abstractmethod
    def divide(self, numbers: Tensor, shape: Sequence[int], /) -> Sequence[Tensor]:
        """The tensors that were joined: shape[0] tensors of the shape shape[1:]."""

    @abstractmethod
    def size(self, x: Tensor, /) -> int:
        """How many numbers a tensor has."""

    @abstractmethod
    def leaf(self, numbers: Tensor, /) -> Tensor:
        """The tensor as one for which the backward pass computes a gradient."""

    @abstractmethod
    def backward(self, x: Tensor, gradient: Tensor | None, /) -> None:
        """Adds the gradients of a tensor to those of the parameters and leaves.

        Args:
            x: a loss, or the numbers that were sent.
            gradient: at ``x``; None: ``x`` is the loss.
        """

    @abstractmethod
    def send(self, numbers: Tensor, target: int, /) -> None:
        """Sends numbers of the tokens' type to a neighbour. target: its stage."""

    @abstractmethod
    def receive(self, size: int, source: int, /) -> Tensor:
        """So many numbers of the tokens' type, from a neighbour. source: its stage."""

    @abstractmethod
    def send_size(self, size: int, target: int, /) -> None:
        """Sends a size to a neighbour. target: its stage."""

    @abstractmethod
    def receive_size(self, source: int, /) -> int:
        """The size that a neighbour has sent. source: its stage."""

    @abstractmethod
    def of_the_last(self, x: Tensor, /) -> Tensor:
        """The tensor of the last stage, on all stages. x: of the same shape and type on all."""

    # ------------------------------------------------------------------- shared by all frameworks

    def walk(
        self,
        embed: Callable[[], Tensor],
        shape: Sequence[int],
        layers: Sequence[Layer],
        keep: Collection[int],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """What ``core.methods.networks.run`` returns, on the last stage; zeros on the others.

        Args:
            embed: gives the tokens before the first block.
            shape: of the tokens, (N, T, D).
            layers: of all stages.
            keep: as in ``run``.
        """
        outputs: dict[int, Tensor] = {}
        if self.is_first:
            x = embed()
        else:
            earlier = sorted(i for i in keep if i < self.blocks.start)
            x, *kept = self._take([1 + len(earlier), *shape])
            outputs = dict(zip(earlier, kept, strict=True))
        for i in self.blocks:
            x = layers[i](x)
            if i in keep:
                outputs[i] = x
        if self.is_last:
            return x, outputs
        self._leave(self.join([x, *(outputs[i] for i in sorted(outputs))]))
        nothing = self.zeros(shape)
        return nothing, dict.fromkeys(keep, nothing)

    def _take(self, shape: Sequence[int]) -> Sequence[Tensor]:
        """The tensors from the previous stage, shape[0] of the shape shape[1:]."""
        if not self.is_recording():
            return self.divide(self.receive(prod(shape), self.rank - 1), shape)
        begin, self._taken = self._taken, self._taken + prod(shape)
        return self.divide(self._inbox[begin : self._taken], shape)

    def _leave(self, numbers: Tensor) -> None:
        """Gives the next stage its numbers."""
        if self.is_recording():
            self._outbox.append(numbers)
        else:
            self.send(numbers, self.rank + 1)

    def differentiate(self, computes: Sequence[Callable[[], Outcome]]) -> list[Outcome]:
        """Adds the gradients of losses, one of each micro-batch, in the order of 1F1B.

        Args:
            computes: the losses of equal micro-batches.

        Returns:
            The outcomes, which are right on the last stage.
        """
        outcomes: list[Outcome] = []
        graphs: dict[int, tuple[Tensor | None, Tensor]] = {}

        def forward(part: int, received: Tensor | None) -> Tensor:
            self._inbox = None if received is None else self.leaf(received)
            self._taken, self._outbox = 0, []
            outcomes.append(computes[part]())
            sent = outcomes[-1].loss if self.is_last else self.join(self._outbox)
            graphs[part] = self._inbox, sent
            return sent.detach()

        def backward(part: int, gradient: Tensor | None) -> Tensor | None:
            received, sent = graphs.pop(part)
            self.backward(sent, gradient)
            if received is None:
                return None
            unused = received.grad is None
            return self.zeros([self.size(received)]) if unused else received.grad

        self._size = 0
        order = one_forward_one_backward(self.rank, self.stages, len(computes))
        run(order, self, forward, backward)
        return outcomes

    def receive_features(self, part: int) -> Tensor:
        """See ``core.parallel.pipeline.Links``. The micro-batches have one size."""
        if part == 0:
            self._size = self.receive_size(self.rank - 1)
        return self.receive(self._size, self.rank - 1)

    def send_features(self, part: int, features: Tensor) -> None:
        """See ``core.parallel.pipeline.Links``."""
        if part == 0:
            self.send_size(self.size(features), self.rank + 1)
        self.send(features, self.rank + 1)

    def receive_gradient(self, features: Tensor) -> Tensor:
        """See ``core.parallel.pipeline.Links``."""
        return self.receive(self.size(features), self.rank + 1)

    def send_gradient(self, gradient: Tensor) -> None:
        """See ``core.parallel.pipeline.Links``."""
        self.send(gradient, self.rank - 1)


class Substitutes(NamedTuple):
    """What takes the place of networks that other stages have: native modules of a backend.

    Attributes:
        identity: builds a module that returns its input.
        absent: builds a module that returns zeros, from their number for each image.
    """

    identity: Callable[[], Any]
    absent: Callable[[int], Any]


def keep(model: Any, spec: RunSpec, stage: Stage, substitutes: Substitutes) -> None:
    """Leaves this process its stage of a whole model, in place.

    Args:
        model: with the branches ``student`` and, unless it is None, ``teacher``.
        stage: of this process.
        substitutes: build what takes the place of other stages' networks.
    """
    for branch in (each for each in (model.student, model.teacher) if each is not None):
        encoder = branch.encoder
        encoder.stage = stage
        for i in set(range(len(encoder.blocks))) - set(stage.blocks):
            encoder.blocks[i] = substitutes.identity()
        if not stage.is_first:
            encoder.cls_token = encoder.pos_embed = None
            encoder.patch_embed = substitutes.identity()
        if not stage.is_last:
            encoder.norm = encoder.fc_norm = substitutes.identity()
            _replace_networks(branch, spec, substitutes)


def _replace_networks(branch: Any, spec: RunSpec, substitutes: Substitutes) -> None:
    for name, width in widths(spec).items():
        *path, own = name.split(".")
        parent = reduce(getattr, path, branch)
        if hasattr(parent, own):  # the teacher has some of the networks only
            setattr(parent, own, substitutes.absent(width))


def widths(spec: RunSpec) -> dict[str, int]:
    """The number of outputs of each network beside the encoder, by its name within the student.

    Each classifier of a sweep is a network.
    """
    found: dict[str, int] = {}
    for param in parameters.table(spec):
        branch, part, *rest = param.name.split(".")
        if branch == "student" and part != "encoder" and len(param.shape) == 2:
            numbered = part == "classifier" and rest[0].isdigit()
            found[f"{part}.{rest[0]}" if numbered else part] = param.shape[0]
    return found
