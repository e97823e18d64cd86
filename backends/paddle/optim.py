"""Optimizers of named parameters. The tensors of their state have canonical names.

Paddle's own optimizers keep momentum, decay and the powers of the betas in float32. Parameters
must be changed by operations in place: ``p *= s`` would make a new tensor, and leave the parameter
of the model unchanged.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import paddle
from paddle import Tensor

from triptych.backends.paddle import flat
from triptych.backends.paddle.layers import plain_forms_serve
from triptych.backends.paddle.sharded import WHOLE, Norms, Owners
from triptych.core.config.spec import AdamWSpec, LarsSpec, OptimSpec, SgdSpec
from triptych.core.contracts import ALONE, Group, Hyper
from triptych.core.optim import groups
from triptych.core.optim.lars import TRUST_EPSILON, buffer_rates

EPSILON = 2.0**-27
"""The number that is added instead of eps.

Paddle 2.6 rounds the number to float32, and a power of two stays exact.
"""


class _Pack(NamedTuple):
    """Parameters of a group that are views of one buffer (see ``flat.pack``), and their moments.

    Attributes:
        names: canonical names of the parameters, in the order of the buffers.
        values: the buffer of the parameters.
        moments: the buffers of their moments.
    """

    group: groups.Group
    names: list[str]
    values: Tensor
    moments: list[Tensor]


class Optimizer(ABC):
    """Implements ``core.contracts.Optimizer``. Subclasses are the rules.

    On a GPU the parameters of a group are packed.

    Args:
        named: canonical name -> trainable parameter.
        members: the group of each parameter (see ``core.optim.groups``).
        norms: of tensors of which this process may have a part.
        copies: the copies of the model that share the state. Each has that of some parameters.
    """

    count: int
    """Number of updates done. During an update it counts that one, too."""
    kinds: tuple[str, ...]
    """The kinds of moments, e.g. "exp_avg"."""

    def __init__(
        self,
        named: Mapping[str, Tensor],
        spec: OptimSpec,
        members: Mapping[str, groups.Group],
        norms: Norms = WHOLE,
        copies: Group = ALONE.replicas,
    ) -> None:
        self.named = dict(named)
        self.spec, self.clip_norm, self.norms = spec, spec.clip_norm, norms
        self.owners = Owners(named, copies)
        self.members = dict(members)
        self.count = 0
        self._moments = [self._zeros() for _ in self.kinds]
        self._packs = self._packed()

    @paddle.no_grad()
    def step(self, hyper: Hyper) -> None:
        """Clips the gradients if the spec has ``clip_norm``, then does one update."""
        self._clip()
        self.count += 1
        self._update(hyper)
        self.owners.spread()

    def zero_grad(self) -> None:
        """Clears the gradients."""
        for parameter in self.named.values():
            parameter.clear_gradient(False)

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the current gradients."""
        return self.norms.total({name: _squares(gradient) for name, _, gradient in self._trained()})

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Kind -> name of a parameter -> moment, for the parameters that this copy updates."""
        return dict(zip(self.kinds, self._moments, strict=True))

    def _update(self, hyper: Hyper) -> None:
        """Does one update with the rates of this step."""
        done: set[str] = set()
        for group, names, values, moments in self._packs:
            if all(self.named[name].grad is not None for name in names):
                lr, decay = groups.rates(group, self.spec, hyper)
                gradients = [self._gradient(name, decay) for name in names]
                self._change(lr, decay, values, flat.join(gradients), *moments)
                done.update(names)
        for name, parameter, _ in self._updated():
            if name not in done:
                lr, decay = self._rates(name, hyper)
                moments = [own[name] for own in self._moments]
                gradient = self._gradient(name, decay).contiguous()
                for part in flat.parts(parameter, gradient, *moments):
                    self._change(lr, decay, *part)

    def _gradient(self, name: str, decay: float) -> Tensor:
        """The gradient by which ``_change`` updates a parameter.

        Args:
            decay: the weight decay of the parameter.
        """
        return self.named[name].grad

    @abstractmethod
    def _change(
        self, lr: float, decay: float, parameter: Tensor, gradient: Tensor, *moments: Tensor
    ) -> None:
        """Updates a parameter, a part of it, or packed ones, and their moments in place.

        Args:
            lr: the learning rate of the group.
            decay: the weight decay of the group.
        """

    def _rates(self, name: str, hyper: Hyper) -> tuple[float, float]:
        """The (learning rate, weight decay) of a parameter at this step."""
        return groups.rates(self.members[name], self.spec, hyper)

    def _zeros(self) -> dict[str, Tensor]:
        owned = filter(self.owners.own, self.named)
        return {name: paddle.zeros_like(self.named[name]) for name in owned}

    def _packed(self) -> list[_Pack]:
        """The parameters that this copy updates, packed by group; none on the CPU."""
        members: dict[groups.Group, dict[str, Tensor]] = {}
        for name, parameter in self.named.items():
            if self.owners.own(name) and plain_forms_serve(parameter):
                members.setdefault(self.members[name], {})[name] = parameter
        packs = []
        for group, own in members.items():
            moments = [flat.pack([kind[name] for name in own]) for kind in self._moments]
            packs.append(_Pack(group, [*own], flat.pack([*own.values()]), moments))
        return packs

    def _trained(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, parameter and gradient of each parameter that has a gradient."""
        for name, parameter in self.named.items():
            if parameter.grad is not None:
                yield name, parameter, parameter.grad

    def _updated(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Likewise, of each parameter that this copy updates."""
        return (row for row in self._trained() if self.owners.own(row[0]))

    def _clip(self) -> None:
        if self.clip_norm is None:
            return
        scale = _number(self.clip_norm) / (_exact(self.gradient_norm()) + _number(1e-6))
        scale = paddle.minimum(scale, _number(1.0))
        for _, _, gradient in self._trained():
            _multiply_(gradient, scale)


class AdamW(Optimizer):
    """AdamW (see ``core.reference.optim.adamw``)."""

    spec: AdamWSpec
    kinds = ("exp_avg", "exp_avg_sq")

    def _change(
        self, lr: float, decay: float, parameter: Tensor, gradient: Tensor, *moments: Tensor
    ) -> None:
        (beta1, beta2), (mean, square) = self.spec.betas, moments
        # m / (sqrt(v) / c + eps), where numerator and denominator are multiplied by EPSILON / eps.
        factor = EPSILON / self.spec.eps
        correction = factor / math.sqrt(1.0 - beta2**self.count)
        mean.scale_(beta1).add_(gradient * (1.0 - beta1))
        square.scale_(beta2).add_(paddle.square(gradient).scale_(1.0 - beta2))
        size = paddle.sqrt(square).scale_(correction, EPSILON)
        rate = factor * lr / (1.0 - beta1**self.count)
        parameter.scale_(1.0 - lr * decay).subtract_((mean * rate).divide_(size))


class Sgd(Optimizer):
    """SGD with momentum. Weight decay is added to the gradient of every tensor."""

    spec: SgdSpec
    kinds = ("momentum_buffer",)

    def _change(
        self, lr: float, decay: float, parameter: Tensor, gradient: Tensor, *moments: Tensor
    ) -> None:
        decayed = (parameter * decay).add_(gradient)
        buffer = moments[0].scale_(self.spec.momentum).add_(decayed)
        parameter.subtract_(buffer * lr)


class Lars(Optimizer):
    """LARS (see ``core.reference.optim``). Paddle has neither form."""

    spec: LarsSpec
    kinds = ("momentum_buffer",)

    def _update(self, hyper: Hyper) -> None:
        self._divided = self._divided_norms(hyper)
        super()._update(hyper)

    def _gradient(self, name: str, decay: float) -> Tensor:
        """Decayed and scaled, if the parameter has more than one dimension."""
        parameter, gradient = self.named[name], super()._gradient(name, decay)
        if parameter.ndim == 1:
            return gradient
        decayed = (parameter * decay).add_(gradient)
        sizes = self._divided.get(name) or map(_norm, self._sized(parameter, gradient, decayed))
        _multiply_(decayed, self._ratio(*map(_exact, sizes), decay))
        return decayed

    def _change(
        self, lr: float, decay: float, parameter: Tensor, gradient: Tensor, *moments: Tensor
    ) -> None:
        entering, leaving = buffer_rates(self.spec, lr)
        buffer = moments[0].scale_(self.spec.momentum)
        buffer.add_(gradient if entering == 1.0 else gradient * entering)
        parameter.subtract_(buffer if leaving == 1.0 else buffer * leaving)

    def _sized(self, parameter: Tensor, gradient: Tensor, decayed: Tensor) -> tuple[Tensor, Tensor]:
        """The two tensors whose norms give the trust ratio.

        Args:
            gradient: without weight decay.
            decayed: gradient with weight decay.
        """
        return parameter, gradient if self.spec.form == "mmpretrain" else decayed

    def _divided_norms(self, hyper: Hyper) -> dict[str, list[Tensor]]:
        """The norms of ``_sized`` for tensors of which this process has a part."""
        squares = {}
        for name, parameter, gradient in self._updated():
            if parameter.ndim > 1 and self.norms.divides(name):
                decayed = (parameter * self._rates(name, hyper)[1]).add_(gradient)
                squares[name] = [*map(_squares, self._sized(parameter, gradient, decayed))]
        return self.norms.of_divided(squares)

    def _ratio(self, norm: Tensor, size: Tensor, decay: float) -> Tensor:
        """The trust ratio: a scalar on the device, for which the host does not wait.

        Args:
            norm: of the parameter.
            size: norm of the other tensor of ``_sized``.
            decay: the weight decay.
        """
        trusted = _number(self.spec.trust_coefficient) * norm
        if self.spec.form == "mmpretrain":
            return trusted / (size + _number(decay) * norm + _number(TRUST_EPSILON))
        # Paddle 2.6 takes 1e-8 for equal to 0, and not for less.
        usable = paddle.logical_and(norm > 0.0, size > 0.0)
        return paddle.where(usable, trusted / size, _number(1.0))


def _multiply_(x: Tensor, factor: Tensor) -> None:
    """Multiplies ``x`` by ``factor`` in place. On a GPU the host does not wait for the factor.

    Args:
        factor: (), float64; it is rounded to the precision of ``x``.
    """
    if plain_forms_serve(x):
        x.multiply_(factor.astype(x.dtype))
    else:
        # On the CPU a product with a tensor is broadcast and takes 15 times as long.
        x.scale_(float(factor))


def _norm(x: Tensor) -> Tensor:
    """The L2 norm, a scalar."""
    return paddle.sqrt(_squares(x))


def _exact(x: Tensor) -> Tensor:
    return x.astype(paddle.float64)


def _number(value: float) -> Tensor:
    """A float64 scalar as a tensor. Paddle 2.6 would round a Python number to float32."""
    return paddle.full([], value, paddle.float64)


def _squares(x: Tensor) -> Tensor:
    # paddle.linalg.norm and paddle.dot are 1 % too small for a large float32 tensor.
    return paddle.square(x).sum()


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adamw": AdamW, "sgd": Sgd, "lars": Lars}
