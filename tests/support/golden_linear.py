"""Replays a golden linear probe and says what differs from the numbers recorded there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from conftest import relative_error
from support.golden_eval import MOCA_VIT, VIT, case, classified_images, encoder_state, philox
from support.golden_weights import RULES, Array, probe

from triptych.core import parameters
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Batch, State
from triptych.core.engine import Engine
from triptych.core.optim.plan import Plan

RESNET = {"name": "resnet18", "image_size": 32, "stem": "imagenet"}
MODELS: dict[str, dict[str, Any]] = {
    "linear_moco_resnet18": RESNET,
    "linear_moco_resnet50": {**RESNET, "name": "resnet50"},
    "linear_moco_v3_vit": VIT,
    "linear_moco_v3_resnet18": RESNET,
}
"""Case with one classifier -> section ``model``."""
AUGMENTED = ("linear_moco_v3_vit", "linear_moco_v3_resnet18", "both_last2")
"""Cases that compute their features at each step. The images are the same in each epoch, so that
the others, which are longer, compute them once."""
MOCA_KEY = 3300
MOCA_FEATURES: dict[str, dict[str, Any]] = {
    "avg": {"pooling": "mean"},
    "cls": {},
    "both": {"pooling": "both"},
    "cls_last4": {"blocks": 4},
    "both_last2": {"pooling": "both", "blocks": 2},
}
"""Run of linear_moca -> keys of the section ``method``."""
FEATURE, LOSS, WEIGHT = 1e-12, 1e-11, 1e-11
"""Relative errors that are allowed. A change of the images' last bits moves them by 1e-12."""


def feed(name: str) -> str:
    """Key ``method.features`` of a case or a run of linear_moca."""
    return "augmented" if name in AUGMENTED else "cached"


def probe_spec(
    model: dict[str, Any], method: dict[str, Any], optim: dict[str, Any], train: dict[str, Any]
) -> RunSpec:
    """A linear probe with SGD, without weight decay."""
    return RunSpec.model_validate(
        {
            "precision": "float64",
            "threads": 1,
            "model": model,
            "method": {"name": "linear", **method},
            "optim": {"name": "sgd", "weight_decay": 0.0, "per": "epoch", **optim},
            "train": train,
        }
    )


@dataclass(frozen=True)
class Task:
    """A linear probe with its data.

    Attributes:
        spec: of the run.
        state: before the first step.
        images: for training and for validation, (N, C, H, W) or features (N, D).
        labels: likewise, (N,).
        order: (epochs, N), the training images in the order of their use.
    """

    spec: RunSpec
    state: State
    images: list[Array]
    labels: list[Array]
    order: Array

    @property
    def plan(self) -> Plan:
        """The schedules of the run."""
        return Plan(self.spec, self.spec.train.steps_per_epoch(len(self.labels[0])))

    def batches(self, images: Array) -> Iterator[Batch]:
        """All batches of the run, of the training images or their features."""
        size, steps = self.spec.train.batch_size, self.plan.steps_per_epoch
        for epoch in self.order:
            for first in range(0, steps * size, size):
                rows = epoch[first : first + size]
                yield Batch((images[rows],), rows, self.labels[0][rows])


def single_head(name: str) -> Task:
    """The probe of MoCo or MoCo v3."""
    settings, arrays = case(name)
    told, v3 = settings["config"], "v3" in name
    optim = {"lr": told["lr"], "scale_lr_by": 256 if v3 else None}
    if not v3:
        optim |= {"schedule": "multistep", "milestones": told["schedule"]}
    train = {"epochs": told["epochs"], "batch_size": told["batch"], "drop_last": False}
    method = {"classes": told["ncls"], "features": feed(name)}
    spec = probe_spec(MODELS[name], method, optim, train)
    counts = (told["ntr"], told["nva"])
    images, labels = classified_images(philox(told["key"]), told["ncls"], counts, told["img"])
    state = encoder_state(spec, settings["encoder_prefix_for_weight_rule"])
    shape = (told["ncls"], parameters.probe_width(spec))
    state |= head("student.classifier", f"{settings['head']}.weight", shape)
    return Task(spec, state, images, labels, arrays["order"])


def moca(run: str, numbers: Sequence[int], decays: Sequence[float] = ()) -> Task:
    """The probe of MOCA with one classifier for each rate and decay.

    Args:
        run: key of ``MOCA_FEATURES``.
        numbers: of the rates in the golden case.
        decays: weight decays of each rate; empty: none.
    """
    settings, arrays = case("linear_moca")
    told = settings["config"]
    method = {"classes": told["classes"], "features": feed(run), **MOCA_FEATURES[run]}
    method["rates"] = [settings["base_lr"][number] for number in numbers]
    method["weight_decays"] = list(decays)
    train = {"epochs": told["epochs"], "batch_size": told["batch"]}
    spec = probe_spec(MOCA_VIT, method, {"lr": 1.0, "scale_lr_by": 256}, train)
    generator, counts = philox(MOCA_KEY), (told["train"], told["val"])
    images, labels = classified_images(generator, told["classes"], counts, told["image"])
    state = encoder_state(spec, "encoder_teacher.")
    for i, number in enumerate(official_heads(numbers, decays)):
        name, shape = f"student.classifier.{i}", (told["classes"], parameters.probe_width(spec))
        state |= head(name, f"head{number}.linear.weight", shape)
    return Task(spec, state, images, labels, arrays["order"])


def official_heads(numbers: Sequence[int], decays: Sequence[float]) -> list[int]:
    """Numbers of classifiers in the golden case: the decays of a rate come one after another."""
    count = len(decays) or 1
    return [number * count + i for number in numbers for i in range(count)]


def paddle_head() -> Task:
    """The classifier of PaddleFleetX on the mean of given feature maps."""
    settings, arrays = case("linear_paddle")
    told = settings["config"]
    model = {**VIT, "width": told["feature_channels"], "depth": 1}  # the encoder is not used
    optim = {"schedule": "multistep", "milestones": told["milestones"], "lr": told["lr"]}
    spec = probe_spec(
        model,
        {"classes": told["classes"], "features": "cached"},
        {**optim, "scale_lr_by": None},
        {"epochs": told["epochs"], "batch_size": told["batch"]},
    )
    state = encoder_state(spec, "base_encoder.")
    state["student.encoder.pos_embed"] = np.zeros((1, 17, told["feature_channels"]))
    state["student.classifier.weight"] = arrays["weight"][0]
    state["student.classifier.bias"] = arrays["bias"][0]
    names = ("feature_maps", "val_maps")
    features = [arrays[name].astype(np.float64).mean((2, 3)) for name in names]
    labels = [arrays["labels"], arrays["val_labels"]]
    return Task(spec, state, features, labels, arrays["order"])


def head(name: str, official: str, shape: tuple[int, int]) -> State:
    """The first weights of a classifier."""
    weight = RULES["head:0.01z"](official, official, shape)
    return {f"{name}.weight": weight, f"{name}.bias": np.zeros(shape[0])}


@dataclass
class Replay:
    """What a run of a task left.

    Attributes:
        features: of the training and the validation images; None: they were given.
        rows: metrics of each step.
        lr: of each step.
        heads: before and after each step, the classifiers' (weights, biases), each stacked:
            (classifiers, classes, D) and (classifiers, classes).
        logits: after each epoch, of the validation images: (classifiers, N, classes).
        sizes: number of images of each step.
        frozen: whether the encoder is as it was, to the last bit.
    """

    features: list[Array] | None
    rows: list[dict[str, Array]]
    lr: list[float]
    heads: list[tuple[Array, Array]]
    logits: list[Array]
    sizes: list[int]
    frozen: bool


def replay(backend: ModuleType, task: Task, epochs: int | None = None) -> Replay:
    """Runs a task, or its first epochs."""
    plan, engine = task.plan, backend.build(task.spec, task.state)
    before, given = engine.export_state(), task.images[0].ndim == 2
    features = None if given else [engine.frozen_features(images) for images in task.images]
    inputs = features if features and task.spec.method.features == "cached" else task.images
    found = Replay(features, [], [], [_heads(engine)], [], [], True)
    for step, batch in enumerate(task.batches(inputs[0])):
        if epochs is not None and step == epochs * plan.steps_per_epoch:
            break
        hyper = plan.hyper(step)
        values, _ = engine.trace_step(batch, {}, hyper)
        found.rows.append(values)
        found.lr.append(hyper.lr)
        found.sizes.append(len(batch.index))
        found.heads.append(_heads(engine))
        if (step + 1) % plan.steps_per_epoch == 0:
            found.logits.append(engine.classify(inputs[1]))
    after = engine.export_state()
    encoder = [name for name in before if name.startswith("student.encoder.")]
    found.frozen = all(np.array_equal(before[name], after[name]) for name in encoder)
    engine.close()
    return found


def _heads(engine: Engine) -> tuple[Array, Array]:
    slots, count = engine.model_slots(), len(engine.spec.method.probes)
    places = [f"student.classifier.{i}." for i in range(count)]
    names = places if count > 1 else ["student.classifier."]
    return tuple(np.stack([slots[n + kind].read() for n in names]) for kind in ("weight", "bias"))


def scores(logits: Array, labels: Array) -> tuple[float, float, float]:
    """Top-1, top-5 (percent) and the mean loss of one classifier. logits: (N, classes)."""
    picked = logits[np.arange(len(labels)), labels]
    better = (logits > picked[:, None]).sum(1)
    shifted = logits - logits.max(1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    return 100.0 * (better < 1).mean(), 100.0 * (better < 5).mean(), float(loss.mean())


class Checks(list[str]):
    """What differs by more than is allowed."""

    def near(self, name: str, got: Any, want: Any, allowed: float) -> None:
        """Compares relatively to the largest number."""
        error = relative_error(got, want)
        if not error <= allowed:
            self.append(f"{name}: {error:.2e} > {allowed:.0e}")


def disagreements_single(found: Replay, name: str, task: Task) -> list[str]:
    """What of a probe of MoCo or MoCo v3 differs from its golden case."""
    settings, golden = case(name)
    wrong, steps, epochs = Checks(), len(found.rows), len(found.logits)
    wrong.near("image sums", [images.sum() for images in task.images], golden["image_sum"], 1e-12)
    for kind, features in zip(("train", "val"), found.features or [], strict=True):
        wrong.near(f"{kind} features", features, golden[f"{kind}_features"], FEATURE)
    wrong.near("lr", found.lr, golden["lr"][:steps], 1e-15)
    wrong.near("loss", [row["loss"] for row in found.rows], golden["loss"][:steps], LOSS)
    weights = [weight[0] for weight, _ in found.heads]
    wrong.near("bias", [b[0] for _, b in found.heads], golden["head_bias"][: steps + 1], WEIGHT)
    norms, probes = [np.linalg.norm(w) for w in weights], [probe(w) for w in weights]
    wrong.near("norm", norms, golden["head_weight_norm"][: steps + 1], WEIGHT)
    wrong.near("probe", probes, golden["head_weight_probe"][: steps + 1], WEIGHT)
    for i, step in enumerate(settings["head_weight_steps"]):
        if step <= steps:
            wrong.near(f"weight/{step}", weights[step], golden["head_weight"][i], WEIGHT)
    columns = ("acc1", "acc5", "loss")
    validation = [scores(logits[0], task.labels[1]) for logits in found.logits]
    sizes = np.reshape(found.sizes, (epochs, -1))
    for i, column in enumerate(columns):
        train = np.reshape([row[ROWS[column]] for row in found.rows], (epochs, -1))
        means = (train * sizes).sum(1) / sizes.sum(1)
        # The program adds up accuracies in float32.
        allowed = LOSS if column == "loss" else 1e-6
        wrong.near(f"train {column}", means, golden[f"epoch/train_{column}_avg"][:epochs], allowed)
        got = [row[i] for row in validation]
        wrong.near(f"val {column}", got, golden[f"epoch/val_{column}_avg"][:epochs], allowed)
    if not found.frozen:
        wrong.append("the encoder moved")
    return wrong


ROWS = {"acc1": "acc1", "acc5": "acc5", "loss": "loss"}
"""Name in the golden case -> name in a traced step."""


def disagreements_moca(found: Replay, run: str, task: Task, heads: Sequence[int]) -> list[str]:
    """What of a sweep differs from its golden case.

    Args:
        heads: the rates' numbers in the golden case.
    """
    golden = {n.partition("/")[2]: a for n, a in case("linear_moca")[1].items() if _of(run, n)}
    wrong, epochs, steps = Checks(), len(found.logits), len(found.rows)
    for kind, features in zip(("train", "val"), found.features or [], strict=True):
        wrong.near(f"{kind} features", features, golden[f"{kind}_features"], FEATURE)
    rates = np.array(task.spec.method.rates)
    lr = np.array(found.lr)[:, None] * rates
    wrong.near("lr", lr, golden["lr"][:steps, heads], 1e-15)
    losses = [[row[f"loss_{i}"] for i in range(len(heads))] for row in found.rows]
    wrong.near("loss", losses, golden["loss"][:steps, heads], LOSS)
    for name, kind, of in (
        ("weight_norm", 0, np.linalg.norm),
        ("weight_probe", 0, probe),
        ("bias_probe", 1, probe),
    ):
        got = [[of(array) for array in step[kind]] for step in found.heads[1:]]
        wrong.near(name, got, golden[name][:steps, heads], WEIGHT)
    size, labels = task.spec.train.batch_size, task.labels[1]
    parts = [slice(first, first + size) for first in range(0, len(labels), size)]
    for i, column in enumerate(("acc1", "acc5", "loss")):
        # The program averages the losses of batches, the last of which is smaller.
        of = parts if column == "loss" else [slice(None)]
        got = [
            [np.mean([scores(head[part], labels[part])[i] for part in of]) for head in logits]
            for logits in found.logits
        ]
        allowed = LOSS if column == "loss" else 1e-6
        wrong.near(f"val {column}", got, golden["val"][:epochs, heads, i], allowed)
    if not found.frozen:
        wrong.append("the encoder moved")
    return wrong


def _of(run: str, name: str) -> bool:
    return name.startswith(f"{run}/")
