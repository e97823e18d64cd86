"""The loss and the gradients of a step, computed micro-batch by micro-batch.

The loss of most methods is a mean over images, so the gradients of the micro-batches add up. Batch
norm in the heads of MoCo v3 joins all images of a batch. Its gradients pass in two phases (gradient
cache, arXiv 2101.06983): the loss of the whole batch gives the gradient at the encoder's features,
then each micro-batch passes the encoder once more, which turns this gradient into those of the
parameters. The two passes are equal, since each draw belongs to one sample.

In data parallelism each copy of the model differentiates the share of its images in the loss of the
step's batch. So the gradients of the copies add up, too.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add
from typing import Any, Protocol

from triptych.core.contracts import Batch, Method, Ops, Outcome, Step, Targets, Tensor
from triptych.core.methods.exchange import gathered, summed_by_name

AnyStep = Step[Any, Any]


class Autograd(Protocol):
    """Differentiates on one framework. ``core.engine.Engine`` implements it."""

    def differentiate(
        self, compute: Callable[..., Outcome], /, *inputs: Tensor
    ) -> tuple[Outcome, list[Tensor]]:
        """Adds the gradients of the loss of ``compute(*inputs)`` to those of the parameters.

        Returns:
            The outcome, and the gradient of its loss at each of ``inputs``.
        """

    def differentiate_all(self, computes: Sequence[Callable[[], Outcome]], /) -> list[Outcome]:
        """Adds the gradients of several losses, each of a micro-batch, as ``differentiate`` does.

        The stages of a pipeline work on several of them at the same time.
        """


@dataclass(frozen=True)
class Accumulation:
    """One step of a method in micro-batches.

    Attributes:
        autograd: differentiates.
        method: of the step.
        step: what the method's functions work with.
        batch: the images of this copy of the model, as arrays, with places.
        parts: its micro-batches in order, with tensors and places.
        features: whether the outcome has the features of all copies.
        scale: factor of the loss that is differentiated (see ``core.optim.scaling``).
    """

    autograd: Autograd
    method: Method[Any, Any]
    step: AnyStep
    batch: Batch
    parts: Sequence[Batch]
    features: bool = True
    scale: float = 1.0

    def differentiate(self) -> Outcome:
        """The outcome of the step, of all copies of the model.

        The gradients of this copy's share of the scaled loss are added to those of the parameters.
        """
        with self.step.ops.no_grad():
            targets = self.method.targets(self.step, self.parts)
        two_phases = self.method.WHOLE and len(self.parts) > 1
        outcomes = [
            self._in_two_phases(targets, number) if two_phases else self._in_shares(targets, number)
            for number in range(self.method.LOSSES)
        ]
        with self.step.ops.no_grad():
            return self._of_all_copies(outcomes, targets)

    def _of_all_copies(self, outcomes: Sequence[Outcome], targets: Targets) -> Outcome:
        """The outcome of the step, from those of the losses of this copy of the model."""
        ops, replicas = self.step.ops, self.step.replicas
        shares = {
            **_merged([outcome.metrics for outcome in outcomes]),
            # The name is no metric's: a probe has a metric of the name "loss".
            "": reduce(add, (outcome.loss for outcome in outcomes)),
        }
        metrics = summed_by_name(ops, replicas, shares)
        loss = metrics.pop("")
        if self.scale != 1:
            loss = loss / self.scale
        features = {}
        if self.features:
            features = _merged([*(outcome.features for outcome in outcomes), targets.features])
            features = {
                name: gathered(ops, replicas, x, self.batch) for name, x in features.items()
            }
        return Outcome(loss, {**metrics, **targets.metrics}, features, targets.kept)

    def _in_shares(self, targets: Targets, number: int) -> Outcome:
        """One loss, as the sum of the shares of its micro-batches."""
        outcomes = self.autograd.differentiate_all(
            [
                partial(self._share, part, wanted, number, first=i == 0 and not targets.tracked)
                for i, (part, wanted) in enumerate(zip(self.parts, targets.values, strict=True))
            ]
        )
        with self.step.ops.no_grad():
            first = outcomes[0]
            metrics = {n: reduce(add, (o.metrics[n] for o in outcomes)) for n in first.metrics}
            features = {
                name: joined(self.step.ops, [o.features[name] for o in outcomes], self.parts)
                for name in first.features
            }
            return Outcome(reduce(add, (o.loss for o in outcomes)), metrics, features)

    def _share(
        self, part: Batch, wanted: Mapping[str, Tensor], number: int, *, first: bool
    ) -> Outcome:
        """A micro-batch's share of one loss. first: whether it moves the running statistics."""
        with tracking(self.step, "student", first):
            features = self.method.predict(self.step, part, number)
            outcome = self.method.loss(self.step, part, features, wanted, number)
        return self._weighted(part, outcome)

    def _weighted(self, part: Batch, outcome: Outcome) -> Outcome:
        """The share of some images in a scaled loss that is a mean over the images of a step."""
        if self.scale != 1:
            outcome = replace(outcome, loss=outcome.loss * self.scale)
        if len(part.index) == part.whole_size:
            return outcome
        share = part.places["share"]
        metrics = {name: value * share for name, value in outcome.metrics.items()}
        return Outcome(outcome.loss * share, metrics, outcome.features)

    def _in_two_phases(self, targets: Targets, number: int) -> Outcome:
        """One loss of the whole batch, with the activations of one micro-batch at a time."""
        step, method, first = self.step, self.method, not targets.tracked

        def predict(part: Batch) -> Tensor:
            return method.predict(step, part, number)

        with step.ops.no_grad():
            features = by_parts(step, self.parts, "student", predict, first=first)
        with tracking(step, "student", first):
            outcome, (gradient,) = self.autograd.differentiate(
                lambda x: self._weighted(
                    self.batch, method.loss(step, self.batch, x, targets.values[0], number)
                ),
                features,
            )
        starts = [part.first - self.batch.first for part in self.parts]
        shares = [
            gradient[start : start + len(part.index)]
            for start, part in zip(starts, self.parts, strict=True)
        ]
        with tracking(step, "student", False):
            self.autograd.differentiate_all(
                [
                    partial(_surrogate, predict, part, share)
                    for part, share in zip(self.parts, shares, strict=True)
                ]
            )
        return outcome


def by_parts(
    step: AnyStep,
    parts: Sequence[Batch],
    branch: str,
    compute: Callable[[Batch], Tensor],
    *,
    first: bool = True,
) -> Tensor:
    """The rows that networks in training mode give for all micro-batches, one after the other.

    Args:
        branch: whose networks ``compute`` uses, "student" or "teacher".
        compute: gives the rows of a micro-batch.
        first: whether the first micro-batch moves the running statistics of batch norms. No other
            one does.
    """
    rows = []
    for i, part in enumerate(parts):
        with tracking(step, branch, first and i == 0):
            rows.append(compute(part))
    return joined(step.ops, rows, parts)


def joined(ops: Ops, rows: Sequence[Tensor], parts: Sequence[Batch]) -> Tensor:
    """The rows of all micro-batches together.

    Args:
        rows: of each micro-batch, (V * n, ...): n images in each of V views, view 1 first.

    Returns:
        (V * N, ...), view 1 first.
    """
    if len(parts) == 1:
        return rows[0]
    sizes = [len(part.index) for part in parts]
    views = len(rows[0]) // sizes[0]
    pieces = [
        x[view * size : (view + 1) * size]
        for view in range(views)
        for x, size in zip(rows, sizes, strict=True)
    ]
    return ops.concat(pieces, axis=0)


def rows_of(x: Tensor, part: Batch) -> Tensor:
    """The rows of a micro-batch. x: (N, ...), of the step's batch."""
    return x if len(x) == len(part.index) else x[part.rows]


@contextmanager
def tracking(step: AnyStep, branch: str, flag: bool) -> Iterator[None]:
    """Whether batch norms of a branch move their running statistics in the block."""
    if flag:
        yield
        return
    step.model.track(branch, False)
    yield
    step.model.track(branch, True)


def _surrogate(predict: Callable[[Batch], Tensor], part: Batch, gradient: Tensor) -> Outcome:
    """A loss whose gradient at the features of a micro-batch is ``gradient``."""
    return Outcome((predict(part) * gradient).sum())


def _merged(groups: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value for group in groups for name, value in group.items()}
