"""MoCo v3 as a careful user writes it, for the step benchmark.

The loop uses the framework's layers and optimizer, and nothing of the engine.
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from triptych.backends.torch.kernels import torch_defaults
from triptych.backends.torch.plain.device import Device
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Array, Batch, Hyper


class PlainLoop:
    """One run on ``spec.device``, from the framework's own initial weights."""

    def __init__(self, spec: RunSpec, mixed: torch.dtype | None = None) -> None:
        """Builds the networks.

        Args:
            mixed: type of autocast; None: all is float32.
        """
        self.temperature, self.device = spec.method.temperature, Device(spec.device, mixed)
        self.query, self.key = _encoder(spec).to(spec.device), _encoder(spec).to(spec.device)
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        width, hidden = spec.method.output_dim, spec.method.hidden_dim
        self.predictor = nn.Sequential(*_layer(width, hidden), *_layer(hidden, width, last=True))
        self.predictor.to(spec.device)
        parameters = [*self.query.parameters(), *self.predictor.parameters()]
        self.optimizer = torch.optim.AdamW(
            [p for p in parameters if p.requires_grad],
            betas=spec.optim.betas,
            eps=spec.optim.eps,
        )

    @torch_defaults()
    def step(self, batch: Batch, hyper: Hyper) -> Tensor:
        """One training step; returns the loss."""
        view1, view2 = map(self.device.send, batch.views)
        with self.device.autocast():
            q1, q2 = self.predictor(self.query(view1)), self.predictor(self.query(view2))
            with torch.no_grad():
                self._update_key(hyper.ema)
                k1, k2 = self.key(view1), self.key(view2)
            loss = self._loss(q1, k2) + self._loss(q2, k1)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = hyper.lr, hyper.weight_decay
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch_defaults()
    def features(self, images: Array) -> Array:
        """The encoder's features (N, D) of images (N, C, H, W), in evaluation mode."""
        vit = self.query[0].eval()
        with torch.no_grad():
            return vit(self.device.send(images)).cpu().numpy()

    def wait(self) -> None:
        """Waits until the steps so far are complete."""
        self.device.wait()

    def _update_key(self, momentum: float) -> None:
        for source, target in zip(self.query.parameters(), self.key.parameters(), strict=True):
            target.mul_(momentum).add_(source, alpha=1.0 - momentum)

    def _loss(self, q: Tensor, k: Tensor) -> Tensor:
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / self.temperature
        labels = torch.arange(len(q), device=q.device)
        return 2 * self.temperature * F.cross_entropy(logits, labels)


def _encoder(spec: RunSpec) -> nn.Sequential:
    model, method = spec.model, spec.method
    vit = VisionTransformer(
        img_size=model.size,
        patch_size=model.patch_size,
        in_chans=model.channels,
        num_classes=0,
        embed_dim=model.width,
        depth=model.depth,
        num_heads=model.heads,
        mlp_ratio=model.mlp_ratio,
        norm_layer=partial(nn.LayerNorm, eps=model.layer_norm_eps),
    )
    vit.pos_embed.requires_grad_(False)
    vit.patch_embed.requires_grad_(False)
    widths = [model.width, *[method.hidden_dim] * (method.projector_layers - 1)]
    head: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        head += _layer(fan_in, fan_out)
    return nn.Sequential(vit, *head, *_layer(widths[-1], method.output_dim, last=True))


def _layer(fan_in: int, fan_out: int, *, last: bool = False) -> list[nn.Module]:
    linear = nn.Linear(fan_in, fan_out, bias=False)
    if last:
        return [linear, nn.BatchNorm1d(fan_out, affine=False)]
    return [linear, nn.BatchNorm1d(fan_out), nn.ReLU(inplace=True)]
