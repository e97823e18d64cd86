"""The optimizer's state shared among the copies of the model: each updates the tensors it owns."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from triptych.backends.torch.parallel import Group
from triptych.core import contracts
from triptych.core.parallel.owners import owners


class Owned:
    """The owners of some parameters (see ``core.parallel.owners``).

    Args:
        named: the trainable parameters, by canonical name.
        replicas: the copies of the model.

    Attributes:
        names: of the parameters that this copy owns.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], replicas: contracts.Group) -> None:
        self._group = cast(Group, replicas)
        owner = owners({name: p.numel() for name, p in named.items()}, replicas.count)
        ranks = range(replicas.count)
        self._parameters = [[p for n, p in named.items() if owner[n] == rank] for rank in ranks]
        self.names = frozenset(name for name in named if owner[name] == replicas.rank)

    def sum_gradients(self) -> None:
        """Gives each owner the sums of the gradients over the copies. Others keep no gradient."""
        self._group.sum_gradients_to_owners(self._parameters)

    @torch.no_grad()
    def share(self) -> None:
        """Gives the parameters of each owner to all copies."""
        for owner, parameters in enumerate(self._parameters):
            for parameter in parameters:
                self._group.broadcast(parameter, owner)
