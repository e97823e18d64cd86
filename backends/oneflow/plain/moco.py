"""MoCo v1 and v2 on a ResNet as a careful user writes them, for the step benchmark.

The loop is for one process. It uses OneFlow's layers and SGD, a copy of the queue for the loss, and
the accuracy that the authors log. It uses nothing of the engine.
"""

import oneflow as flow
import oneflow.nn.functional as F
from oneflow import Tensor, nn

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Batch, Hyper


class PlainLoop:
    """One run in float32 on the CPU, from the framework's own initial weights."""

    def __init__(self, spec: RunSpec) -> None:
        method = spec.method
        self.temperature, size = method.temperature, method.queue_size
        self.query, self.key = _encoder(spec), _encoder(spec)
        self.key.load_state_dict(self.query.state_dict())
        self.key.requires_grad_(False)
        self.queue = F.normalize(flow.randn(method.output_dim, size), dim=0)
        self.pointer = 0
        self.optimizer = flow.optim.SGD(
            self.query.parameters(), lr=spec.optim.lr, momentum=spec.optim.momentum
        )

    def step(self, batch: Batch, hyper: Hyper) -> float:
        """One training step; returns the loss."""
        view1, view2 = (flow.from_numpy(view) for view in batch.views)
        q = F.normalize(self.query(view1), dim=1)
        with flow.no_grad():
            for source, target in zip(self.query.parameters(), self.key.parameters(), strict=True):
                target.mul_(hyper.ema).add_(source, alpha=1.0 - hyper.ema)
            order = flow.randperm(len(view2))
            back = order.argsort().to(flow.int64)
            k = F.normalize(self.key(view2.index_select(0, order)), dim=1).index_select(0, back)
        positive = (q * k).sum(1, keepdim=True)
        logits = flow.cat([positive, flow.matmul(q, self.queue.clone())], dim=1) / self.temperature
        loss = F.cross_entropy(logits, flow.zeros(len(q), dtype=flow.int64))
        self._enqueue(k)
        _accuracy(logits)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = hyper.lr, hyper.weight_decay
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def wait(self) -> None:
        """Waits for OneFlow's queue. For the CPU there is no public function."""
        flow._oneflow_internal.eager.Sync()

    @flow.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Overwrites the oldest keys. The queue's size is a multiple of the batch size."""
        self.queue[:, self.pointer : self.pointer + len(keys)] = keys.transpose(0, 1)
        self.pointer = (self.pointer + len(keys)) % self.queue.shape[1]


class _Block(nn.Module):
    def __init__(self, before: int, inner: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        shapes = [(before, inner, 3, stride), (inner, inner, 3, 1)]
        if bottleneck:
            shapes = [(before, inner, 1, 1), (inner, inner, 3, stride), (inner, 4 * inner, 1, 1)]
        after, layers = shapes[-1][1], list[nn.Module]()
        for shape in shapes:
            layers += [_conv(*shape), nn.BatchNorm2d(shape[1]), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Identity()
        if before != after or stride > 1:
            shortcut = _conv(before, after, 1, stride)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x), inplace=True)


def _encoder(spec: RunSpec) -> nn.Sequential:
    """torchvision's network with the head."""
    method, bottleneck = spec.method, spec.model.bottleneck
    layers = [_conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for stage, depth in enumerate(spec.model.depths):
        for i in range(depth):
            inner, stride = 64 * 2**stage, 2 if stage and not i else 1
            layers.append(_Block(before, inner, stride, bottleneck=bottleneck))
            before = inner * (4 if bottleneck else 1)
    layers += [nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(1)]
    if method.name == "moco_v2":
        layers += [nn.Linear(before, before), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(before, method.output_dim))


def _conv(fan_in: int, fan_out: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(fan_in, fan_out, kernel, stride, kernel // 2, bias=False)


@flow.no_grad()
def _accuracy(logits: Tensor) -> tuple[float, float]:
    best = logits.topk(5, dim=1).indices == 0
    return best[:, :1].float().sum().item(), best.float().sum().item()
