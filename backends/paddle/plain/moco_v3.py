"""MoCo v3 as a careful user writes it, for the step benchmark.

The loop uses the framework's layers and optimizer, and nothing of the engine.
"""

import itertools

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from triptych.core.config.spec import RunSpec, VitSpec
from triptych.core.contracts import Array, Batch, Hyper


class PlainLoop:
    """One run in float32 on the CPU, from the framework's own initial weights."""

    def __init__(self, spec: RunSpec) -> None:
        self.temperature = spec.method.temperature
        self.query, self.key = _encoder(spec), _encoder(spec)
        self.key.set_state_dict(self.query.state_dict())
        for parameter in self.key.parameters():
            parameter.stop_gradient = True
        width, hidden = spec.method.output_dim, spec.method.hidden_dim
        self.predictor = nn.Sequential(*_layer(width, hidden), *_layer(hidden, width, last=True))
        parameters = [*self.query.parameters(), *self.predictor.parameters()]
        self.optimizer = paddle.optimizer.AdamW(
            spec.optim.lr,
            *spec.optim.betas,
            spec.optim.eps,
            parameters=[p for p in parameters if not p.stop_gradient],
            weight_decay=spec.optim.weight_decay,
        )

    def step(self, batch: Batch, hyper: Hyper) -> float:
        """One training step; returns the loss."""
        view1, view2 = (paddle.to_tensor(view) for view in batch.views)
        q1, q2 = self.predictor(self.query(view1)), self.predictor(self.query(view2))
        with paddle.no_grad():
            for source, target in zip(self.query.parameters(), self.key.parameters(), strict=True):
                target.scale_(hyper.ema).add_(source * (1.0 - hyper.ema))
            k1, k2 = self.key(view1), self.key(view2)
        loss = self._loss(q1, k2) + self._loss(q2, k1)
        self.optimizer.set_lr(hyper.lr)
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        return float(loss)

    def features(self, images: Array) -> Array:
        """The encoder's features (N, D) of images (N, C, H, W), in evaluation mode."""
        vit = self.query[0]
        vit.eval()
        with paddle.no_grad():
            return vit(paddle.to_tensor(images)).numpy()

    def wait(self) -> None:
        """Does nothing: on the CPU a step is complete when it returns."""

    def _loss(self, q: Tensor, k: Tensor) -> Tensor:
        logits = paddle.matmul(F.normalize(q), F.normalize(k), transpose_y=True) / self.temperature
        return 2 * self.temperature * F.cross_entropy(logits, paddle.arange(len(q)))


class _Attention(nn.Layer):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        query, key, value = self.qkv(x).reshape([n, t, 3, self.heads, -1]).unbind(2)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.reshape([n, t, width]))


class _Block(nn.Layer):
    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        width, hidden = spec.width, spec.mlp_width
        self.norm1 = nn.LayerNorm(width, spec.layer_norm_eps)
        self.norm2 = nn.LayerNorm(width, spec.layer_norm_eps)
        self.attn = _Attention(width, spec.heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Vit(nn.Layer):
    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        tokens = 1 + spec.grid[0] * spec.grid[1]
        self.patch_embed = nn.Conv2D(spec.channels, spec.width, spec.patch_size, spec.patch_size)
        self.cls_token = self.create_parameter([1, 1, spec.width])
        self.pos_embed = self.create_parameter([1, tokens, spec.width])
        self.blocks = nn.Sequential(*[_Block(spec) for _ in range(spec.depth)])
        self.norm = nn.LayerNorm(spec.width, spec.layer_norm_eps)
        for parameter in (self.pos_embed, *self.patch_embed.parameters()):
            parameter.stop_gradient = True

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose([0, 2, 1])
        x = paddle.concat([self.cls_token.expand([len(x), 1, -1]), x], axis=1) + self.pos_embed
        return self.norm(self.blocks(x))[:, 0]


def _encoder(spec: RunSpec) -> nn.Sequential:
    model, method = spec.model, spec.method
    widths = [model.width, *[method.hidden_dim] * (method.projector_layers - 1)]
    head: list[nn.Layer] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        head += _layer(fan_in, fan_out)
    return nn.Sequential(_Vit(model), *head, *_layer(widths[-1], method.output_dim, last=True))


def _layer(fan_in: int, fan_out: int, *, last: bool = False) -> list[nn.Layer]:
    linear = nn.Linear(fan_in, fan_out, bias_attr=False)
    if last:
        return [linear, nn.BatchNorm1D(fan_out, weight_attr=False, bias_attr=False)]
    return [linear, nn.BatchNorm1D(fan_out), nn.ReLU()]
