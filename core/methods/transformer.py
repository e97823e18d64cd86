"""The way through a vision transformer, which needs no framework.

A backend's class inherits from ``Transformer`` first and from the framework's module class last. It
adds the native parts.

Shape letters: N images, C channels, H height, W width, L patches, T tokens, D width.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from triptych.core.contracts import Tensor
from triptych.core.methods.networks import run, walk
from triptych.core.parallel.stage import Stage

Scales = Sequence[tuple[Tensor, Tensor]]
"""The factors of both residual branches of each block, as ``core.contracts.Encoder`` has them."""


class Transformer:
    """Implements ``core.contracts.MaskedEncoder``.

    Attributes:
        blocks: the modules of the blocks.
        norm: the module of the norm after the blocks.
        fc_norm: the module of the norm after the pooling.
        width: D.
        patch_count: L.
        recompute: whether the backward pass computes the activations of each block again.
        stage: which blocks this process has, if it is a stage of a pipeline.
    """

    blocks: Any
    norm: Any
    fc_norm: Any
    width: int
    patch_count: int
    recompute = False
    stage: Stage | None = None

    # ----------------------------------------------------------------- native parts of a backend

    def embed(self, images: Tensor) -> Tensor:
        """The class token and the patches, with their positions. (N, C, H, W) -> (N, 1+L, D)."""
        raise NotImplementedError

    def embed_some(self, images: Tensor, ids: Tensor) -> Tensor:
        """The class token and the patches ``ids`` (N, T), with their positions. (N, 1+T, D)."""
        raise NotImplementedError

    def last_block(self, x: Tensor) -> Tensor:
        """The class token after the last block, from the tokens before it. (N, T, D) -> (N, D)."""
        raise NotImplementedError

    def attend(self, x: Tensor) -> Tensor:
        """How strongly the class token attends to each token in the last block.

        Args:
            x: (N, T, D), the tokens before the block.

        Returns:
            (N, heads, T).
        """
        raise NotImplementedError

    def mean(self, x: Tensor) -> Tensor:
        """The mean of the patch tokens. (N, 1+L, D) -> (N, D)."""
        raise NotImplementedError

    def repeated(self, scales: Scales, images: Tensor) -> Scales:
        """Factors (N, 1, 1), in the shape in which they multiply tokens (N, 1+L, D)."""
        return scales

    def kept(self, layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The layer, which keeps its activations or computes them again in the backward pass."""
        raise NotImplementedError

    # ------------------------------------------------------------------- shared by all frameworks

    def forward(self, images: Tensor) -> Tensor:
        """The class token after the last norm. (N, C, H, W) -> (N, D)."""
        x, _ = self.walk(images, [*self.layers()[:-1], self.kept(self.last_block)])
        return self.norm(x if x.ndim == 2 else x[:, 0])  # earlier stages have all tokens

    def pooled(self, images: Tensor, pooling: str, scales: Scales = ()) -> Tensor:
        """See ``core.contracts.Encoder``."""
        if pooling == "cls" and not scales:
            return self.forward(images)
        x, _ = self.walk(images, self.layers(self.repeated(scales, images)))
        x = self.norm(x)
        return self.fc_norm(x[:, 0] if pooling == "cls" else self.mean(x))

    def tokens(self, images: Tensor, layers: Sequence[int] = ()) -> dict[str, Tensor]:
        """See ``core.contracts.Encoder``."""
        x, outputs = self.walk(images, self.layers(), layers)
        return {"final": self.norm(x), **{f"layer{i}": y for i, y in outputs.items()}}

    def masked(self, images: Tensor, ids: Tensor, early: int) -> tuple[Tensor, Tensor]:
        """See ``core.contracts.MaskedEncoder``."""
        early_block = len(self.blocks) - 1 - early
        x, outputs = self.walk(images, self.layers(), (early_block,), ids)
        final = self.norm(x)
        return outputs[early_block] if early else final, final

    def class_attention(self, images: Tensor) -> Tensor:
        """See ``core.contracts.MaskedEncoder``."""
        x, _ = run(self.embed(images), list(self.blocks)[:-1])
        return self.attend(x)

    def layers(self, scales: Scales = ()) -> list[Callable[[Tensor], Tensor]]:
        """The blocks as functions of the tokens."""
        return [self.kept(block) for block in walk(self.blocks, scales)]

    def walk(
        self,
        images: Tensor,
        layers: Sequence[Callable[[Tensor], Tensor]],
        keep: Collection[int] = (),
        ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Embeds the patches, or those of the indices ``ids``, and applies the layers.

        Args:
            images: (N, C, H, W).
            layers: of all stages.
            keep: indices of the layers whose output to return too.
            ids: (N, T), patches; None: all.

        Returns:
            As ``core.methods.networks.run``; zeros if a later stage computes this.
        """
        some = ids is not None
        embed = partial(self.embed_some, images, ids) if some else partial(self.embed, images)
        if self.stage is None:
            return run(embed(), layers, keep)
        length = ids.shape[1] if ids is not None else self.patch_count
        return self.stage.walk(embed, (len(images), 1 + length, self.width), layers, keep)
