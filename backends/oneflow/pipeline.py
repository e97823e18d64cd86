"""Pipeline parallelism: a pass over a built model that leaves each process its stage.

All processes of a pipeline run the same step. Where a stage lacks the networks, zeros take the
place of their outputs, which nothing uses: the last stage has heads, loss and memory, and its
results replace those of the others. The order of the stages' work is that of
``core.parallel.pipeline``.

Shape letters: N images, T tokens, D width.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow.parallel import Group
from triptych.core import contracts
from triptych.core.contracts import Outcome
from triptych.core.parallel.pipeline import one_forward_one_backward, run
from triptych.core.parallel.stages import blocks_of

Layer = Callable[[Tensor], Tensor]


class Stage:
    """The blocks that this process has of an encoder, and its connections with the neighbours.

    Without gradients the tokens go from stage to stage as they are computed. With gradients
    ``differentiate`` receives and sends them: a network takes them from ``inbox``, and leaves its
    own in ``outbox``.

    Args:
        group: the processes of the pipeline, in the order of their stages.
    """

    def __init__(self, depth: int, group: Group) -> None:
        self.group, self.blocks = group, blocks_of(depth, group.count)[group.rank]
        self.is_first, self.is_last = group.rank == 0, group.rank == group.count - 1
        self.inbox: Tensor | None = None
        self.outbox: list[Tensor] = []
        self._taken = 0

    def walk(
        self,
        embed: Callable[[], Tensor],
        like: Tensor,
        layers: Sequence[Layer],
        keep: Collection[int],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """What ``core.methods.networks.run`` returns, on the last stage; zeros on the others.

        Args:
            embed: gives the tokens before the first block.
            like: (N, T, D), a tensor of the shape and type of the tokens.
            layers: of all stages.
            keep: as in ``run``.
        """
        outputs: dict[int, Tensor] = {}
        if self.is_first:
            x = embed()
        else:
            earlier = sorted(i for i in keep if i < self.blocks.start)
            x, *kept = self._receive(1 + len(earlier), like)
            outputs = dict(zip(earlier, kept, strict=True))
        for i in self.blocks:
            x = layers[i](x)
            if i in keep:
                outputs[i] = x
        if self.is_last:
            return x, outputs
        self._send(flow.stack([x, *(outputs[i] for i in sorted(outputs))]))
        nothing = flow.zeros_like(like)
        return nothing, dict.fromkeys(keep, nothing)

    def _receive(self, count: int, like: Tensor) -> tuple[Tensor, ...]:
        if not flow.is_grad_enabled():
            rows = self.group.receive((count * like.numel(),), like, self.group.rank - 1)
        else:
            stop = self._taken + count * like.numel()
            rows = cast(Tensor, self.inbox)[self._taken : stop]
            self._taken = stop
        return flow.unbind(rows.reshape(count, *like.shape), dim=0)

    def _send(self, stacked: Tensor) -> None:
        if flow.is_grad_enabled():
            self.outbox.append(stacked)
        else:
            self.group.send(stacked.reshape(-1), self.group.rank + 1)

    def differentiate(
        self, computes: Sequence[Callable[[], Outcome]], like: Tensor
    ) -> list[Outcome]:
        """Adds the gradients of losses, one of each micro-batch, in the order of 1F1B.

        Args:
            like: a tensor of the type and on the device of the tokens.

        Returns:
            The outcomes, which are right on the last stage.
        """
        outcomes: list[Outcome] = []
        graphs: dict[int, tuple[Tensor | None, Tensor]] = {}

        def forward(part: int, received: Tensor | None) -> Tensor:
            self.inbox = None if received is None else received.requires_grad_()
            self._taken, self.outbox = 0, []
            outcomes.append(computes[part]())
            sent = outcomes[-1].loss
            if not self.is_last:
                sent = flow.cat([tokens.reshape(-1) for tokens in self.outbox])
            graphs[part] = self.inbox, sent
            return sent.detach()

        def backward(part: int, gradient: Tensor | None) -> Tensor | None:
            received, sent = graphs.pop(part)
            if sent.requires_grad:
                sent.backward(gradient)
            if received is None:
                return None
            return flow.zeros_like(received) if received.grad is None else received.grad

        order = one_forward_one_backward(self.group.rank, self.group.count, len(computes))
        run(order, _Links(self.group, like), forward, backward)
        return outcomes

    def of_the_last(self, x: Tensor) -> Tensor:
        """The tensor of the last stage, on all stages. x: of the same shape and type on all."""
        return self.group.sum(x if self.is_last else flow.zeros_like(x))


class _Links:
    """The connections of a stage, for ``core.parallel.pipeline.run``.

    Args:
        like: a tensor of the type and on the device of the tokens.
    """

    def __init__(self, group: Group, like: Tensor) -> None:
        self._group, self._like = group, like
        self._size = flow.zeros((1,), dtype=flow.int64)

    def receive_features(self, part: int) -> Tensor:
        size = self._group.receive((1,), self._size, self._group.rank - 1)
        return self._group.receive((int(size.numpy()),), self._like, self._group.rank - 1)

    def send_features(self, features: Tensor) -> None:
        size = flow.tensor([features.numel()], dtype=flow.int64)
        self._group.send(size, self._group.rank + 1)
        self._group.send(features, self._group.rank + 1)

    def receive_gradient(self, features: Tensor) -> Tensor:
        return self._group.receive(tuple(features.shape), features, self._group.rank + 1)

    def send_gradient(self, gradient: Tensor) -> None:
        self._group.send(gradient, self._group.rank - 1)


class _Absent(nn.Module):
    """Takes the place of a network of the last stage. (N, ...) -> (N, width), zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """The decoder has a row for each number of its last argument."""
        rows = others[-1].numel() if others else len(x)
        return x.new_zeros((rows, self.width))


def keep_stage(model: nn.Module, group: contracts.Group) -> Stage | None:
    """Leaves this process its stage of a whole model, in place. None: there is no pipeline.

    Args:
        model: with the branches ``student`` and, unless it is None, ``teacher``.
        group: the processes of the pipeline.
    """
    if group.count == 1:
        return None
    whole = cast(Any, model)
    branches = [branch for branch in (whole.student, whole.teacher) if branch is not None]
    stage = Stage(len(branches[0].encoder.blocks), cast(Group, group))
    for branch in branches:
        _keep_stage_of(branch, stage)
    return stage


def _keep_stage_of(branch: Any, stage: Stage) -> None:
    encoder = branch.encoder
    encoder.stage = stage
    for i in range(len(encoder.blocks)):
        if i not in stage.blocks:
            encoder.blocks[i] = nn.Identity()
    if not stage.is_first:
        encoder.cls_token = encoder.pos_embed = None
        encoder.patch_embed = nn.Identity()
    if not stage.is_last:
        encoder.norm = encoder.fc_norm = nn.Identity()
        for name, part in dict(branch.named_children()).items():
            if name != "encoder":
                setattr(branch, name, _placeholder(part))


def _placeholder(part: Any) -> nn.Module:
    """Zeros for the outputs of a network, or of each of several classifiers."""
    if hasattr(part, "0") and not isinstance(part, nn.Sequential):
        for name, classifier in dict(part.named_children()).items():
            setattr(part, name, _placeholder(classifier))
        return cast(nn.Module, part)
    if hasattr(part, "blocks"):
        ending = part.norm  # of the decoder
    elif hasattr(part, "last"):
        ending = part.last  # of a weight generator
    elif isinstance(part, nn.Sequential):
        weights = dict(part.named_parameters()).items()
        return _Absent([len(x) for name, x in weights if x.ndim == 2][-1])
    else:
        ending = part  # a classifier
    return _Absent(len(ending.weight))
