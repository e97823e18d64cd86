"""MOCA as a careful user writes it, for the step benchmark.

The loop uses the layers of timm and PyTorch and PyTorch's optimizer, and nothing of the engine.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from triptych.backends.torch.kernels import torch_defaults
from triptych.backends.torch.plain.device import Device
from triptych.core.config.spec import MocaSpec, RunSpec, VitSpec
from triptych.core.contracts import Array, Batch, Hyper
from triptych.core.methods import masking


class PlainLoop:
    """One run on ``spec.device``, from the framework's own initial weights."""

    def __init__(self, spec: RunSpec, mixed: torch.dtype | None = None) -> None:
        """Builds the networks.

        Args:
            mixed: type of autocast; None: all is float32.
        """
        model, self.method, device = spec.model, spec.method, spec.device
        self.device = Device(spec.device, mixed)
        rows, columns = model.grid
        self.rounds = self.method.rounds(rows * columns)
        self.inner = self.device.send(masking.interior(model.grid, self.method.border))
        self.student, self.teacher = _encoder(model).to(device), _encoder(model).to(device)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.decoder = _Decoder(model, self.method).to(device)
        self.image_weights = _Weights(model.width, model.width, self.method).to(device)
        self.dense_weights = _Weights(model.width, self.method.decoder_width, self.method).to(
            device
        )
        noise = torch.randn(self.method.words, model.width, device=device)
        self.words, self.pointer = F.normalize(noise.relu(), dim=1), 0
        self.distance = self.distance_used = torch.tensor(0.5, device=device)
        trunk = [*self.student.parameters(), *self.decoder.parameters()]
        generators = [*self.image_weights.parameters(), *self.dense_weights.parameters()]
        self.optimizer = _optimizer(trunk, generators, spec)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.clip_norm = spec.optim.clip_norm
        self.batch_size, self.grid = spec.train.batch_size, model.grid

    def draw(self) -> dict[str, Array]:
        """Masks of both rounds and the choice of new words, drawn by PyTorch's generator."""
        noise = torch.rand(2 * self.batch_size, math.prod(self.grid))
        order = noise.argsort(dim=1).numpy()
        picked = torch.randint(len(self.inner), (self.method.step_words,))
        return {
            "mask_ids_round1": order,
            "mask_ids_round2": masking.complementary(order, *self.rounds),
            "codebook_coin": torch.rand(()).numpy(),
            "codebook_image_perm": torch.randperm(self.batch_size).numpy(),
            "codebook_token_pick": picked.numpy(),
        }

    @torch_defaults()
    def step(self, batch: Batch, hyper: Hyper) -> Tensor:
        """One training step; returns the loss."""
        draws = self.draw()
        images = torch.cat([self.device.send(view) for view in batch.views])
        with self.device.autocast():
            codes, bags, words, difference = self._targets(images, hyper.ema, draws)
            loss = self._loss(images, codes, bags, draws)
        decayed, plain = self.optimizer.param_groups[:2]
        decayed["lr"] = plain["lr"] = hyper.lr
        decayed["weight_decay"] = hyper.weight_decay
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        self.optimizer.step()
        self._learn(words, difference)
        return loss.detach()

    def wait(self) -> None:
        """Waits until the steps so far are complete."""
        self.device.wait()

    @torch.no_grad()
    def _targets(
        self, images: Tensor, momentum: float, draws: Mapping[str, Array]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The teacher's part of a step.

        Returns:
            (2N, L, K), codes.
            (2N, K), bags of words of the other view.
            (M, D), new words.
            (2,), differences of both views.
        """
        for source, target in zip(
            self.student.parameters(), self.teacher.parameters(), strict=True
        ):
            target.mul_(momentum).add_(source, alpha=1.0 - momentum)
        tokens = self.teacher.forward_features(images)[:, 1:]
        cosine = F.normalize(tokens, dim=-1, eps=1e-5) @ self.words.T
        difference = (cosine.amax(-1) - cosine.mean(-1)).mean(1)
        codes = (cosine * (self.method.inverse_delta / self.distance_used)).softmax(-1)
        bags = codes[:, self.inner].mean(1)
        half = len(images) // 2
        place = self.inner[self.device.send(draws["codebook_token_pick"])]
        image = self.device.send(draws["codebook_image_perm"][: len(place)])
        image = image + half * int(draws["codebook_coin"] >= 0.5)
        words = F.normalize(tokens[image, place], dim=1, eps=1e-5)
        return codes, torch.cat([bags[half:], bags[:half]]), words, difference.view(2, half).mean(1)

    def _loss(
        self, images: Tensor, codes: Tensor, bags: Tensor, draws: Mapping[str, Array]
    ) -> Tensor:
        image_weights, dense_weights = (
            self.image_weights(self.words),
            self.dense_weights(self.words),
        )
        loss: Tensor | float = 0.0
        for name, size in zip(("mask_ids_round1", "mask_ids_round2"), self.rounds, strict=True):
            order = self.device.send(draws[name])
            early, last = self._encode(images, order[:, : size.visible])
            pooled = last[:, 1:].mean(1)
            ids = order[:, : size.decoded]
            decoded = self.decoder(pooled, early, ids).flatten(0, 1)
            targets = codes.gather(1, ids[..., None].expand(-1, -1, codes.shape[-1])).flatten(0, 1)
            loss = loss + self.method.image_weight * _divergence(bags, pooled @ image_weights.T)
            loss = loss + self.method.dense_weight * _divergence(targets, decoded @ dense_weights.T)
        return loss

    def _encode(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The output of the early block and the final tokens, each (2N, 1+T, D)."""
        vit = self.student
        x = vit.patch_embed(images) + vit.pos_embed[:, 1:]
        x = x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
        token = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([token, x], dim=1)
        last = len(vit.blocks) - self.method.early_layer
        early = vit.blocks[:last](x)
        final = vit.norm(vit.blocks[last:](early))
        return (early if self.method.early_layer else final), final

    def _learn(self, words: Tensor, differences: Sequence[Tensor]) -> None:
        rows = torch.arange(self.pointer, self.pointer + len(words), device=words.device)
        self.words[rows % len(self.words)] = words.to(self.words.dtype)
        self.pointer = (self.pointer + len(words)) % len(self.words)
        for difference in differences:
            self.distance = 0.99 * self.distance + 0.01 * difference
        self.distance_used = self.distance


class _Decoder(nn.Module):
    def __init__(self, model: VitSpec, method: MocaSpec) -> None:
        super().__init__()
        width, norm = method.decoder_width, partial(nn.LayerNorm, eps=model.layer_norm_eps)
        rows, columns = model.grid
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1 + rows * columns, width), requires_grad=False)
        self.early_norm, self.embed = norm(model.width), nn.Linear(model.width, width)
        self.blocks = nn.Sequential(
            *[
                Block(width, method.decoder_heads, model.mlp_ratio, qkv_bias=True, norm_layer=norm)
                for _ in range(method.decoder_depth)
            ]
        )
        self.norm = norm(width)

    def forward(self, pooled: Tensor, early: Tensor, ids: Tensor) -> Tensor:
        x = self.embed(torch.cat([pooled[:, None], self.early_norm(early[:, 1:])], dim=1))
        masked = self.mask_token.expand(len(x), ids.shape[1] + 1 - x.shape[1], -1)
        x = torch.cat([x, masked], dim=1) + self.places[F.pad(ids + 1, (1, 0))]
        return self.norm(self.blocks(x)[:, 1:])


class _Weights(nn.Module):
    """Makes a predictor's weights from the words."""

    def __init__(self, width: int, out: int, method: MocaSpec) -> None:
        super().__init__()
        hidden = int(width * method.predictor_ratio)
        self.kappa = method.kappa
        self.hidden = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)
        )
        self.last = nn.Linear(hidden, out)
        self.skip = nn.Linear(width, out) if out != width else nn.Identity()

    def forward(self, words: Tensor) -> Tensor:
        return self.kappa * F.normalize(self.last(self.hidden(words)) + self.skip(words), dim=1)


def _encoder(model: VitSpec) -> VisionTransformer:
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
    vit.patch_embed.requires_grad_(not model.freeze_patch_embed)
    return vit


def _optimizer(
    trunk: Sequence[nn.Parameter], generators: Sequence[nn.Parameter], spec: RunSpec
) -> torch.optim.Optimizer:
    """AdamW. Each step sets the rates of the trunk. The weight generators' rates stay constant."""
    optim = spec.optim
    groups = []
    for parameters, lr in ((trunk, optim.lr), (generators, optim.generator_lr)):
        free = [p for p in parameters if p.requires_grad]
        for members, decay in (
            ([p for p in free if p.ndim > 1], optim.weight_decay),
            ([p for p in free if p.ndim <= 1], 0.0),
        ):
            groups.append({"params": members, "lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)


def _divergence(target: Tensor, logits: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, dim=1), target, reduction="batchmean")
