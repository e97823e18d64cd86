"""The networks of each method: student, teacher, and the update of the teacher."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import paddle
from paddle import Tensor, nn

from triptych.backends.paddle import flat, layers
from triptych.backends.paddle.encoders import encoder
from triptych.backends.paddle.heads import head
from triptych.backends.paddle.layers import plain_forms_serve
from triptych.backends.paddle.memory import Codebook, Queue
from triptych.backends.paddle.moca import Decoder, Generator
from triptych.core.contracts import Index
from triptych.core.methods import models, networks


class Branch(networks.Branch, nn.Layer):
    """A student or a teacher (see ``core.methods.networks.Branch``)."""


KIT = networks.Kit(
    branch=Branch,
    encoder=encoder,
    head=head,
    set_batch_norm=layers.set_batch_norm,
    set_tracking=layers.set_tracking,
    queue=Queue,
    codebook=Codebook,
    decoder=Decoder,
    generator=Generator,
    linear=layers.Linear,
)


FLOAT32 = {"layer_norm", "softmax", "mean", "sum", "square", "rsqrt"}
"""Operations that mixed precision leaves in float32, whatever the lists of Paddle's version say."""


class Pair(networks.Branches, nn.Layer):
    """A student and a teacher (see ``core.methods.networks.Branches``)."""

    kit = KIT

    mixed: Literal["bfloat16"] | None = None
    """The type in which the networks compute where Paddle's autocast considers that safe."""

    def __init__(self, student: nn.Layer, teacher: nn.Layer | None = None) -> None:
        super().__init__(student, teacher)
        self.follow()

    def follow(self) -> None:
        """Finds the parameters that the teacher has, and those of the student that they follow."""
        # Paired by name, since the student may have a predictor, too.
        sources = dict(self.student.named_parameters())
        targets = {} if self.teacher is None else dict(self.teacher.named_parameters())
        self._pairs = [(target, sources[name]) for name, target in targets.items()]
        self._packed: Tensor | None = None

    def pack(self) -> None:
        """Packs the teacher's parameters on a GPU (see ``flat.pack``).

        Call this when the networks are complete, and after ``follow``.
        """
        targets = [target for target, _ in self._pairs]
        if targets and plain_forms_serve(targets[0]):
            self._packed = flat.pack(targets)

    def compute(self, part: Callable[..., Any], *arguments: Any) -> Any:
        """See ``core.methods.networks.Branches``."""
        if self.mixed is None:
            return part(*arguments)
        # Autocast ends before the loss and the backward pass. The casts are part of the graph: the
        # backward pass repeats the types of the forward pass by itself. Level O2 would make the
        # parameters 16 bits wide, too.
        with paddle.amp.auto_cast(level="O1", dtype=self.mixed, custom_black_list=FLOAT32):
            output = part(*arguments)
        return networks.each_tensor(lambda x: x.astype(paddle.float32), output)

    @paddle.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """See ``core.contracts.Model``."""
        pairs, statistics = self._pairs, self._running_statistics()
        if self._packed is not None:
            pairs = [(self._packed, flat.join([source for _, source in pairs]))]
        if self.statistics == "averaged":
            pairs = [*pairs, *(pair for pair in statistics if pair[0].is_floating_point())]
        if self.statistics == "copied":
            for target, source in statistics:
                paddle.assign(source, target)
        if pairs:
            # A tensor: Paddle 2.6 would copy a number to the device for each of the pairs.
            weight = paddle.full([], 1.0 - momentum, pairs[0][0].dtype)
            for target, source in pairs:
                # Both forms have the same bits, and leave equal values exactly equal. lerp_ takes a
                # third less time, but for convolutions three times as long.
                if target.ndim > 2:
                    target.add_((source - target).scale_(1.0 - momentum))
                else:
                    target.lerp_(source, weight)

    def _running_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """The buffers of the teacher's batch norms, and those of the student."""
        sources = dict(self.student.named_buffers())
        targets = {} if self.teacher is None else dict(self.teacher.named_buffers())
        return [(target, sources[name]) for name, target in targets.items()]

    @staticmethod
    def freeze(module: nn.Layer) -> None:
        """See ``core.methods.networks.Branches``."""
        for parameter in module.parameters():
            parameter.stop_gradient = True

    @staticmethod
    def indices(index: Index, like: Tensor) -> Tensor:
        """See ``core.methods.networks.Branches``."""
        if isinstance(index, Tensor):
            return index
        return paddle.to_tensor(np.ascontiguousarray(index), place=like.place)

    @staticmethod
    def concat(parts: list[Tensor]) -> Tensor:
        """See ``core.methods.networks.Branches``."""
        return paddle.concat(parts, axis=1)


METHODS = models.complete(Pair)
