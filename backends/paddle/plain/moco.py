"""MoCo v1 and v2 on a ResNet as a careful user writes them, for the step benchmark.

The loop is for one process. It uses Paddle's network, layers and optimizer, a copy of the queue for
the loss, and the accuracy that the authors log. It uses nothing of the engine.
"""

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Batch, Hyper


class PlainLoop:
    """One run in float32 on the CPU, from the framework's own initial weights."""

    def __init__(self, spec: RunSpec) -> None:
        method = spec.method
        self.temperature, size = method.temperature, method.queue_size
        self.query, self.key = _encoder(spec), _encoder(spec)
        self.key.set_state_dict(self.query.state_dict())
        for parameter in self.key.parameters():
            parameter.stop_gradient = True
        self.queue = F.normalize(paddle.randn([method.output_dim, size]), axis=0)
        self.pointer = 0
        self.optimizer = paddle.optimizer.Momentum(
            spec.optim.lr,
            spec.optim.momentum,
            self.query.parameters(),
            weight_decay=spec.optim.weight_decay,
        )
        # Paddle counts the running statistics among the parameters.
        pairs = zip(self.query.parameters(), self.key.parameters(), strict=True)
        self.pairs = [pair for pair in pairs if not pair[0].stop_gradient]

    def step(self, batch: Batch, hyper: Hyper) -> float:
        """One training step; returns the loss."""
        view1, view2 = (paddle.to_tensor(view) for view in batch.views)
        q = F.normalize(self.query(view1))
        with paddle.no_grad():
            for source, target in self.pairs:
                target.scale_(hyper.ema).add_(source * (1.0 - hyper.ema))
            order = paddle.randperm(len(view2))
            k = F.normalize(self.key(paddle.gather(view2, order)))
            k = paddle.gather(k, paddle.argsort(order))
        positive = (q * k).sum(1, keepdim=True)
        logits = paddle.concat([positive, q @ self.queue.clone()], axis=1) / self.temperature
        loss = F.cross_entropy(logits, paddle.zeros([len(q)], "int64"))
        self._enqueue(k)
        _accuracy(logits)
        self.optimizer.set_lr(hyper.lr)
        loss.backward()
        self.optimizer.step()
        self.optimizer.clear_grad(set_to_zero=False)
        return float(loss)

    def wait(self) -> None:
        """Does nothing: on the CPU a step is complete when it returns."""

    @paddle.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        """Overwrites the oldest keys. The queue's size is a multiple of the batch size."""
        self.queue[:, self.pointer : self.pointer + len(keys)] = keys.T
        self.pointer = (self.pointer + len(keys)) % self.queue.shape[1]


def _encoder(spec: RunSpec) -> nn.Layer:
    network = getattr(paddle.vision.models, spec.model.name)(num_classes=spec.method.output_dim)
    if spec.method.name == "moco_v2":
        width = network.fc.weight.shape[0]
        network.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), network.fc)
    return network


@paddle.no_grad()
def _accuracy(logits: Tensor) -> tuple[float, float]:
    best = paddle.topk(logits, 5)[1] == 0
    return float(best[:, :1].astype("float32").sum()), float(best.astype("float32").sum())
