"""The way through a residual network, which needs no framework.

A backend's class inherits from ``Residual`` first and from the framework's module class last. It
adds the native parts.

Shape letters: N images, C channels, H height, W width, L positions of a map, D channels of a map.
"""

from collections.abc import Sequence
from typing import Any

from triptych.core.contracts import Tensor
from triptych.core.methods.networks import run


class Residual:
    """Implements ``core.contracts.Encoder``.

    Attributes:
        layer1, layer2, layer3, layer4: the modules of the stages.
    """

    layer1: Any
    layer2: Any
    layer3: Any
    layer4: Any

    # ----------------------------------------------------------------- native parts of a backend

    def stem(self, images: Tensor) -> Tensor:
        """What comes before the first stage. (N, C, H, W) -> (N, D, H', W')."""
        raise NotImplementedError

    def mean(self, x: Tensor) -> Tensor:
        """The mean over positions. (N, D, H, W) -> (N, D)."""
        raise NotImplementedError

    def with_mean(self, x: Tensor) -> Tensor:
        """The mean over positions, then the positions. (N, D, H, W) -> (N, 1+L, D)."""
        raise NotImplementedError

    # --------------------------------------------------------------------------- the encoder

    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> dict[str, Tensor]:
        """See ``core.contracts.Encoder``."""
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        x, outputs = run(self.stem(images), stages, layers)
        maps = {"final": x, **{f"layer{i}": y for i, y in outputs.items()}}
        return {name: self.with_mean(y) for name, y in maps.items()}

    def pooled(
        self, images: Tensor, pooling: str, scales: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> Tensor:
        """See ``core.contracts.Encoder``."""
        return self.forward(images)

    def forward(self, images: Tensor) -> Tensor:
        """The mean of the last map over its positions. (N, C, H, W) -> (N, D)."""
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(images)))))
        return self.mean(x)
