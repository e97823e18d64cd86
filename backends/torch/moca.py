"""The parts of MOCA's student after its encoder: decoder and weight generators.

Shape letters: N images, T visible patches, M decoded patches, D width, K words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.backends.torch.layers import BatchNorm
from triptych.backends.torch.vit import blocks
from triptych.core import parameters
from triptych.core.config.spec import MocaSpec, VitSpec


class Decoder(nn.Module):
    """Transformer blocks over an image's feature, its visible tokens and mask tokens."""

    def __init__(self, model: VitSpec, method: MocaSpec) -> None:
        super().__init__()
        spec = parameters.decoder_spec(model, method)
        rows, columns = spec.grid
        self.mask_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, spec.width))
        self.pos_embed.requires_grad_(False)
        self.early_norm = nn.LayerNorm(model.width, eps=spec.layer_norm_eps)
        self.embed = nn.Linear(model.width, spec.width)
        self.blocks = blocks(spec)
        self.norm = nn.LayerNorm(spec.width, eps=spec.layer_norm_eps)

    def forward(self, image: Tensor, early: Tensor, ids: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel.decode``."""
        x = torch.cat([image[:, None], self.early_norm(early[:, 1:])], dim=1)
        x = self.embed(x)
        unseen = self.mask_token.expand(len(x), 1 + ids.shape[1] - x.shape[1], -1)
        places = F.pad(ids + 1, (1, 0))  # the image's feature takes the class token's place
        x = torch.cat([x, unseen.to(x.dtype)], dim=1) + self.pos_embed[0][places]
        return self.norm(self.blocks(x)[:, 1:]).flatten(0, 1)


class Generator(nn.Module):
    """Makes a predictor's weights from the words: rows of norm ``scale``. (K, D) -> (K, out)."""

    def __init__(self, model: VitSpec, method: MocaSpec, out: int) -> None:
        super().__init__()
        width, hidden, out = parameters.generator_widths(model, method, out)
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.hidden = nn.Linear(width, hidden, bias=False)
        self.norm = BatchNorm(hidden)
        self.last = nn.Linear(hidden, out)
        self.skip = nn.Linear(width, out) if out != width else nn.Identity()

    def forward(self, words: Tensor) -> Tensor:
        """The words are the batch of the batch norm."""
        x = F.normalize(words, dim=-1, eps=1e-5)
        x = self.skip(x) + self.last(F.relu(self.norm(self.hidden(x))))
        return self.scale * F.normalize(x, dim=-1, eps=1e-5)
