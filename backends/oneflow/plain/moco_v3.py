"""MoCo v3 as a careful user writes it, for the step benchmark.

The loop uses the framework's layers and optimizer, and nothing of the engine.
"""

import itertools

import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn

from triptych.core.config.spec import RunSpec, VitSpec
from triptych.core.contracts import Array, Batch, Hyper


class PlainLoop:
    """One run in float32 on the CPU, from the framework's own initial weights."""

    def __init__(self, spec: RunSpec) -> None:
        self.temperature = spec.method.temperature
        self.query, self.key = _encoder(spec), _encoder(spec)
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        width, hidden = spec.method.output_dim, spec.method.hidden_dim
        self.predictor = nn.Sequential(*_layer(width, hidden), *_layer(hidden, width, last=True))
        parameters = [*self.query.parameters(), *self.predictor.parameters()]
        self.optimizer = flow.optim.AdamW(
            [p for p in parameters if p.requires_grad],
            lr=spec.optim.lr,
            betas=spec.optim.betas,
            eps=spec.optim.eps,
            weight_decay=spec.optim.weight_decay,
        )

    def step(self, batch: Batch, hyper: Hyper) -> float:
        """One training step; returns the loss."""
        view1, view2 = (flow.from_numpy(view) for view in batch.views)
        q1, q2 = self.predictor(self.query(view1)), self.predictor(self.query(view2))
        with flow.no_grad():
            for source, target in zip(self.query.parameters(), self.key.parameters(), strict=True):
                target.mul_(hyper.ema).add_(source, alpha=1.0 - hyper.ema)
            k1, k2 = self.key(view1), self.key(view2)
        loss = self._loss(q1, k2) + self._loss(q2, k1)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = hyper.lr, hyper.weight_decay
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def features(self, images: Array) -> Array:
        """The encoder's features (N, D) of images (N, C, H, W), in evaluation mode."""
        vit = self.query[0].eval()
        with flow.no_grad():
            return vit(flow.from_numpy(images)).numpy()

    def wait(self) -> None:
        """Waits for OneFlow's queue. For the CPU there is no public function."""
        flow._oneflow_internal.eager.Sync()

    def _loss(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
        logits = flow.matmul(q, k, transpose_b=True) / self.temperature
        return 2 * self.temperature * F.cross_entropy(logits, flow.arange(len(q)))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = flow.matmul(query, key, transpose_b=True) * (width // self.heads) ** -0.5
        mixed = flow.matmul(scores.softmax(-1), value)
        return self.proj(mixed.transpose(1, 2).reshape(n, t, width))


class _Block(nn.Module):
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


class _Vit(nn.Module):
    def __init__(self, spec: VitSpec) -> None:
        super().__init__()
        tokens = 1 + spec.grid[0] * spec.grid[1]
        self.patch_embed = nn.Conv2d(spec.channels, spec.width, spec.patch_size, spec.patch_size)
        self.cls_token = nn.Parameter(flow.randn(1, 1, spec.width) * 0.02)
        self.pos_embed = nn.Parameter(flow.randn(1, tokens, spec.width) * 0.02)
        self.blocks = nn.Sequential(*[_Block(spec) for _ in range(spec.depth)])
        self.norm = nn.LayerNorm(spec.width, spec.layer_norm_eps)
        self.pos_embed.requires_grad_(False)
        self.patch_embed.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = flow.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))[:, 0]


def _encoder(spec: RunSpec) -> nn.Sequential:
    model, method = spec.model, spec.method
    widths = [model.width, *[method.hidden_dim] * (method.projector_layers - 1)]
    head: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        head += _layer(fan_in, fan_out)
    return nn.Sequential(_Vit(model), *head, *_layer(widths[-1], method.output_dim, last=True))


def _layer(fan_in: int, fan_out: int, *, last: bool = False) -> list[nn.Module]:
    linear = nn.Linear(fan_in, fan_out, bias=False)
    if last:
        return [linear, nn.BatchNorm1d(fan_out, affine=False)]
    return [linear, nn.BatchNorm1d(fan_out), nn.ReLU(inplace=True)]
