"""MoCo v1 and v2 on a ResNet as a careful user writes them, for the step benchmark.

The loop is for one process. It uses torchvision's network, PyTorch's SGD, a copy of the queue for
the loss, and the accuracy that the authors log. It uses nothing of the engine.
"""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from triptych.backends.torch.kernels import torch_defaults
from triptych.backends.torch.plain.device import Device
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Batch, Hyper


class PlainLoop:
    """One run on ``spec.device``, from the framework's own initial weights."""

    def __init__(self, spec: RunSpec, mixed: torch.dtype | None = None) -> None:
        """Builds the networks.

        Args:
            mixed: type of autocast; None: all is float32.
        """
        method, self.device = spec.method, Device(spec.device, mixed)
        self.temperature, size = method.temperature, method.queue_size
        self.query, self.key = _encoder(spec).to(spec.device), _encoder(spec).to(spec.device)
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        noise = torch.randn(method.output_dim, size, device=spec.device)
        self.queue = F.normalize(noise, dim=0)
        self.pointer = 0
        self.optimizer = torch.optim.SGD(
            self.query.parameters(), lr=spec.optim.lr, momentum=spec.optim.momentum
        )

    @torch_defaults()
    def step(self, batch: Batch, hyper: Hyper) -> Tensor:
        """One training step; returns the loss."""
        view1, view2 = map(self.device.send, batch.views)
        with self.device.autocast():
            q = F.normalize(self.query(view1), dim=1)
            with torch.no_grad():
                self._update_key(hyper.ema)
                order = torch.randperm(len(view2), device=view2.device)
                k = F.normalize(self.key(view2[order]), dim=1)[order.argsort()]
            positive = (q * k).sum(1, keepdim=True)
            logits = torch.cat([positive, q @ self.queue.clone()], dim=1) / self.temperature
            labels = torch.zeros(len(q), dtype=torch.int64, device=q.device)
            loss = F.cross_entropy(logits, labels)
        self._enqueue(k)
        _accuracy(logits)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = hyper.lr, hyper.weight_decay
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def wait(self) -> None:
        """Waits until the steps so far are complete."""
        self.device.wait()

    def _update_key(self, momentum: float) -> None:
        for source, target in zip(self.query.parameters(), self.key.parameters(), strict=True):
            target.mul_(momentum).add_(source, alpha=1.0 - momentum)

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Overwrites the oldest keys. The queue's size is a multiple of the batch size."""
        self.queue[:, self.pointer : self.pointer + len(keys)] = keys.T
        self.pointer = (self.pointer + len(keys)) % self.queue.shape[1]


def _encoder(spec: RunSpec) -> nn.Module:
    network = getattr(torchvision.models, spec.model.name)(num_classes=spec.method.output_dim)
    if spec.method.name == "moco_v2":
        width = network.fc.in_features
        network.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), network.fc)
    return network


@torch.no_grad()
def _accuracy(logits: Tensor) -> tuple[Tensor, Tensor]:
    best = logits.topk(5, dim=1).indices == 0
    return best[:, :1].float().sum(), best.float().sum()
