"""Pipeline parallelism: a pass over a built model that leaves each process its stage.

All processes of a pipeline run the same step. Where a stage lacks the networks, zeros take the
place of their outputs, which nothing uses: the last stage has heads, loss and memory, and its
results replace those of the others. The order of the stages' work is that of
``core.parallel.pipeline``.

Shape letters: N images, T tokens, D width.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import paddle
from paddle import Tensor, nn

from triptych.backends.paddle.parallel import Group
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
        depth: number of blocks of all stages.
        group: the processes of the pipeline, in the order of their stages.
        dtype: of the tokens.
    """

    def __init__(self, depth: int, group: Group, dtype: Any) -> None:
        self.group, self.dtype = group, dtype
        self.blocks = blocks_of(depth, group.count)[group.rank]
        self.is_first, self.is_last = group.rank == 0, group.rank == group.count - 1
        self.inbox: Tensor | None = None
        self.outbox: list[Tensor] = []
        self._taken = 0

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
            x, *kept = self._receive([1 + len(earlier), *shape])
            outputs = dict(zip(earlier, kept, strict=True))
        for i in self.blocks:
            x = layers[i](x)
            if i in keep:
                outputs[i] = x
        if self.is_last:
            return x, outputs
        self._send(paddle.stack([x, *(outputs[i] for i in sorted(outputs))]))
        nothing = paddle.zeros(list(shape), self.dtype)
        return nothing, dict.fromkeys(keep, nothing)

    def _receive(self, shape: list[int]) -> list[Tensor]:
        stacked = paddle.zeros(shape, self.dtype)
        if not paddle.is_grad_enabled():
            self.group.receive(stacked, self.group.rank - 1)
            return stacked.unbind()
        rows = cast(Tensor, self.inbox)[self._taken : self._taken + stacked.size]
        self._taken += stacked.size
        return rows.reshape(shape).unbind()

    def _send(self, stacked: Tensor) -> None:
        if paddle.is_grad_enabled():
            self.outbox.append(stacked)
        else:
            self.group.send(stacked, self.group.rank + 1)

    def differentiate(self, computes: Sequence[Callable[[], Outcome]]) -> list[Outcome]:
        """Adds the gradients of losses, one of each micro-batch, in the order of 1F1B.

        Returns:
            The outcomes, which are right on the last stage.
        """
        outcomes: list[Outcome] = []
        graphs: dict[int, tuple[Tensor | None, Tensor]] = {}

        def forward(part: int, received: Tensor | None) -> Tensor:
            if received is not None:
                received.stop_gradient = False
            self.inbox, self._taken, self.outbox = received, 0, []
            outcomes.append(computes[part]())
            sent = outcomes[-1].loss
            if not self.is_last:
                sent = paddle.concat([tokens.flatten() for tokens in self.outbox])
            graphs[part] = received, sent
            return sent.detach()

        def backward(part: int, gradient: Tensor | None) -> Tensor | None:
            received, sent = graphs.pop(part)
            paddle.autograd.backward([sent], [gradient])
            return None if received is None else received.grad

        order = one_forward_one_backward(self.group.rank, self.group.count, len(computes))
        run(order, _Links(self.group, self.dtype), forward, backward)
        return outcomes

    def of_the_last(self, x: Tensor) -> Tensor:
        """The tensor of the last stage, on all stages. x: of the same shape and type on all."""
        x = x.detach().clone()
        self.group.broadcast(x, self.group.count - 1)
        return x


class _Links:
    """The connections of a stage, for ``core.parallel.pipeline.run``."""

    def __init__(self, group: Group, dtype: Any) -> None:
        self._group, self._dtype = group, dtype

    def receive_features(self, part: int) -> Tensor:
        size = paddle.zeros([1], "int64")
        self._group.receive(size, self._group.rank - 1)
        features = paddle.zeros([int(size)], self._dtype)
        self._group.receive(features, self._group.rank - 1)
        return features

    def send_features(self, features: Tensor) -> None:
        self._group.send(paddle.to_tensor([features.size]), self._group.rank + 1)
        self._group.send(features, self._group.rank + 1)

    def receive_gradient(self, features: Tensor) -> Tensor:
        gradient = paddle.zeros_like(features)
        self._group.receive(gradient, self._group.rank + 1)
        return gradient

    def send_gradient(self, gradient: Tensor) -> None:
        self._group.send(gradient, self._group.rank - 1)


class _Absent(nn.Layer):
    """Takes the place of a network of the last stage. (N, ...) -> (N, width), zeros."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """The decoder has a row for each number of its last argument."""
        rows = others[-1].size if others else len(x)
        return paddle.zeros([rows, self.width], x.dtype)


def keep_stage(model: nn.Layer, group: contracts.Group, dtype: Any) -> Stage | None:
    """Leaves this process its stage of a whole model, in place. None: there is no pipeline.

    Args:
        model: with the branches ``student`` and, unless it is None, ``teacher``.
        group: the processes of the pipeline.
        dtype: of the tokens.
    """
    if group.count == 1:
        return None
    branches = [branch for branch in (model.student, model.teacher) if branch is not None]
    stage = Stage(len(branches[0].encoder.blocks), cast(Group, group), dtype)
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
        for name, part in [*branch.named_children()]:
            if name != "encoder":
                setattr(branch, name, _placeholder(part))


def _placeholder(part: Any) -> nn.Layer:
    """Zeros for the outputs of a network, or of each of several classifiers."""
    if hasattr(part, "0") and not isinstance(part, nn.Sequential):
        for name, classifier in [*part.named_children()]:
            setattr(part, name, _placeholder(classifier))
        return part
    if hasattr(part, "blocks"):
        ending = part.norm  # of the decoder
    elif hasattr(part, "last"):
        ending = part.last  # of a weight generator
    elif isinstance(part, nn.Sequential):
        ending = [layer for layer in part if isinstance(layer, nn.Linear)][-1]
    else:
        ending = part  # a classifier
    return _Absent(ending.weight.shape[-1])
