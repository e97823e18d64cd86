"""The parts of MOCA's student after its encoder: decoder and weight generators.

Shape letters: N images, T visible patches, M decoded patches, D width, K words.
"""

import paddle
from paddle import Tensor, nn
from paddle.nn.initializer import Constant

from triptych.backends.paddle.layers import (
    BatchNorm,
    LayerNorm,
    Linear,
    pick_tokens,
    relu_,
    unit_rows,
)
from triptych.backends.paddle.vit import blocks
from triptych.core import parameters
from triptych.core.config.spec import MocaSpec, VitSpec


class Decoder(nn.Layer):
    """Transformer blocks over an image's feature, its visible tokens and mask tokens."""

    def __init__(self, model: VitSpec, method: MocaSpec) -> None:
        super().__init__()
        spec = parameters.decoder_spec(model, method)
        rows, columns = spec.grid
        zeros = Constant(0.0)
        self.mask_token = self.create_parameter([1, 1, spec.width], default_initializer=zeros)
        self.pos_embed = self.create_parameter(
            [1, 1 + rows * columns, spec.width], default_initializer=zeros
        )
        self.pos_embed.stop_gradient = True
        self.early_norm = LayerNorm(model.width, spec.layer_norm_eps)
        self.embed = Linear(model.width, spec.width)
        self.blocks = blocks(spec)
        self.norm = LayerNorm(spec.width, spec.layer_norm_eps)

    def forward(self, image: Tensor, early: Tensor, ids: Tensor) -> Tensor:
        """See ``core.contracts.MocaModel.decode``."""
        n, decoded = ids.shape
        x = paddle.concat([image.unsqueeze(1), self.early_norm(early[:, 1:])], axis=1)
        x = self.embed(x)
        unseen = self.mask_token.expand([n, 1 + decoded - x.shape[1], -1])
        # The image's feature takes the class token's place.
        places = paddle.concat([paddle.zeros_like(ids[:, :1]), ids + 1], axis=1)
        x = paddle.concat([x, unseen], axis=1) + pick_tokens(self.pos_embed, places)
        return self.norm(self.blocks(x)[:, 1:]).flatten(0, 1)


class Generator(nn.Layer):
    """Makes a predictor's weights from the words: rows of norm ``scale``. (K, D) -> (K, out)."""

    def __init__(self, model: VitSpec, method: MocaSpec, out: int) -> None:
        super().__init__()
        width, hidden, out = parameters.generator_widths(model, method, out)
        self.scale = self.create_parameter([1], default_initializer=Constant(1.0))
        self.scale.stop_gradient = True
        self.hidden = Linear(width, hidden, bias=False)
        self.norm = BatchNorm(hidden)
        self.last = Linear(hidden, out)
        self.skip = Linear(width, out) if out != width else nn.Identity()

    def forward(self, words: Tensor) -> Tensor:
        """The words are the batch of the batch norm."""
        x = unit_rows(words, 1e-5)
        x = self.skip(x) + self.last(relu_(self.norm(self.hidden(x))))
        return self.scale * unit_rows(x, 1e-5)
