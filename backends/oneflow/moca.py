"""The parts of MOCA's student after its encoder: decoder and weight generators.

Shape letters: N images, T visible patches, M decoded patches, D width, K words.
"""

import oneflow as flow
from oneflow import Tensor, nn

from triptych.backends.oneflow.layers import BatchNorm, LayerNorm
from triptych.backends.oneflow.products import Linear
from triptych.backends.oneflow.sums import pick_tokens, unit_rows
from triptych.backends.oneflow.vit import blocks
from triptych.core import parameters
from triptych.core.config.spec import MocaSpec, VitSpec


class Decoder(nn.Module):
    """Transformer blocks over an image's feature, its visible tokens and mask tokens."""

    def __init__(self, model: VitSpec, method: MocaSpec) -> None:
        super().__init__()
        spec = parameters.decoder_spec(model, method)
        rows, columns = spec.grid
        self.mask_token = nn.Parameter(flow.zeros(1, 1, spec.width))
        self.pos_embed = nn.Parameter(flow.zeros(1, 1 + rows * columns, spec.width))
        self.pos_embed.requires_grad_(False)
        self.early_norm = LayerNorm(model.width, spec.layer_norm_eps)
        self.embed = Linear(model.width, spec.width)
        self.blocks = blocks(spec)
        self.norm = LayerNorm(spec.width, spec.layer_norm_eps)

    def forward(self, image: Tensor, early: Tensor, ids: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel.decode``."""
        n, decoded = ids.shape
        x = flow.cat([image.reshape(n, 1, -1), self.early_norm(early[:, 1:])], dim=1)
        x = self.embed(x)
        unseen = self.mask_token.expand(n, 1 + decoded - x.shape[1], -1)
        # The image's feature takes the class token's place.
        places = flow.cat([flow.zeros_like(ids[:, :1]), ids + 1], dim=1)
        x = flow.cat([x, unseen], dim=1) + pick_tokens(self.pos_embed, places)
        x = self.blocks(x)[:, 1:]
        return self.norm(x).reshape(n * decoded, x.shape[2])


class Generator(nn.Module):
    """Makes a predictor's weights from the words: rows of norm ``scale``. (K, D) -> (K, out)."""

    def __init__(self, model: VitSpec, method: MocaSpec, out: int) -> None:
        super().__init__()
        width, hidden, out = parameters.generator_widths(model, method, out)
        self.scale = nn.Parameter(flow.ones(1), requires_grad=False)
        self.hidden = Linear(width, hidden, bias=False)
        self.norm = BatchNorm(hidden)
        self.last = Linear(hidden, out)
        self.skip = Linear(width, out) if out != width else nn.Identity()

    def forward(self, words: Tensor) -> Tensor:
        """The words are the batch of the batch norm."""
        x = unit_rows(words, 1e-5)
        x = self.skip(x) + self.last(flow.relu(self.norm(self.hidden(x))))
        return self.scale * unit_rows(x, 1e-5)
