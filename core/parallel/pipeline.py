"""The order of work in a pipeline: which stage computes and sends what, and when.

A stage passes the features of its blocks to the next stage, and the gradient at its input to the
previous one. After a few forward passes each stage does one forward and one backward pass in turn
(1F1B, arXiv 1806.03377), so stage s of S keeps the activations of at most S - s micro-batches. The
orders of all stages fit each other even where a send waits for its receiver, as that of Gloo does:
of two neighbours that want to send to each other, the later one receives first.

A step of a method has these phases. The teacher's micro-batches pass its stages in the order of
``forward_only``. If the loss joins the whole batch, the student's do so too, without gradient; the
last stage differentiates the loss at the features, and the micro-batches pass again in the order
of ``one_forward_one_backward``, where the last stage begins with these gradients (see
``core.methods.accumulate``). If not, one pass in this order is enough.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

from triptych.core.contracts import Tensor

Kind = Literal[
    "receive features",
    "forward",
    "send features",
    "receive gradient",
    "backward",
    "send gradient",
]


class Work(NamedTuple):
    """One piece of the work of a stage: of which kind, and the micro-batch, from 0."""

    kind: Kind
    part: int


def forward_only(stage: int, stages: int, parts: int) -> list[Work]:
    """The order in which a stage passes all micro-batches on, without gradient.

    Args:
        stage: from 0.
        stages: number of stages.
        parts: number of micro-batches.
    """
    order: list[Work] = []
    for part in range(parts):
        order += _forward(part)
    return [work for work in order if _has(work, stage, stages)]


def one_forward_one_backward(stage: int, stages: int, parts: int) -> list[Work]:
    """The order of a stage's forward and backward passes. Arguments as in ``forward_only``."""
    ahead = min(stages - 1 - stage, parts)
    order: list[Work] = []
    for part in range(ahead):
        order += _forward(part)
    if ahead < parts:
        order.append(Work("receive features", ahead))
    for part in range(parts):
        following = ahead + part
        if following < parts:
            order += _forward(following)[1:]
        order += [Work("receive gradient", part), Work("backward", part)]
        if following + 1 < parts:
            order.append(Work("receive features", following + 1))
        order.append(Work("send gradient", part))
    return [work for work in order if _has(work, stage, stages)]


def _forward(part: int) -> list[Work]:
    return [Work("receive features", part), Work("forward", part), Work("send features", part)]


def _has(work: Work, stage: int, stages: int) -> bool:
    """Whether a stage does this: the first and the last one have one neighbour only."""
    if work.kind in ("receive features", "send gradient"):
        return stage > 0
    if work.kind in ("send features", "receive gradient"):
        return stage < stages - 1
    return True


def in_flight(order: Sequence[Work]) -> int:
    """The largest number of micro-batches whose activations a stage keeps at once."""
    most = kept = 0
    for work in order:
        kept += (work.kind == "forward") - (work.kind == "backward")
        most = max(most, kept)
    return most


class Links(Protocol):
    """The connections of a stage with its neighbours."""

    def receive_features(self, part: int, /) -> Tensor:
        """The features that the previous stage has sent."""

    def send_features(self, part: int, features: Tensor, /) -> None:
        """Sends features to the next stage."""

    def receive_gradient(self, features: Tensor, /) -> Tensor:
        """The gradient at these features, which were sent to the next stage."""

    def send_gradient(self, gradient: Tensor, /) -> None:
        """Sends the gradient at received features to the previous stage."""


def run(
    order: Sequence[Work],
    links: Links,
    forward: Callable[[int, Tensor | None], Tensor],
    backward: Callable[[int, Tensor | None], Tensor | None],
) -> None:
    """Does the work of a stage.

    Args:
        order: of the stage.
        links: its connections.
        forward: (micro-batch, received features; None on the first stage) -> features to send.
        backward: (micro-batch, received gradient; None on the last stage) -> gradient to send.
    """
    received: dict[int, Tensor] = {}
    sent: dict[int, Tensor] = {}
    gradients: dict[int, Tensor | None] = {}
    for kind, part in order:
        if kind == "receive features":
            received[part] = links.receive_features(part)
        elif kind == "forward":
            sent[part] = forward(part, received.pop(part, None))
        elif kind == "send features":
            links.send_features(part, sent[part])
        elif kind == "receive gradient":
            gradients[part] = links.receive_gradient(sent[part])
        elif kind == "backward":
            sent.pop(part)
            gradients[part] = backward(part, gradients.pop(part, None))
        else:
            links.send_gradient(gradients.pop(part))
