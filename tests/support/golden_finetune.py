"""Replays a golden fine-tuning and says what differs from the numbers recorded there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from conftest import relative_error
from support.golden_eval import MOCA_VIT, VIT, case, encoder_state, normal_images
from support.golden_weights import RULES, Array, probe

from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Batch, State
from triptych.core.engine import Engine
from triptych.core.methods import finetune
from triptych.core.optim import groups
from triptych.core.optim.plan import Plan

RUNS = (
    *("readme_warmup", "readme_cosine", "drop_path"),
    *("cls_token_clip", "avg_no_fc_norm_plain_ce", "accumulate_2"),
)
"""Settings of MOCA's fine-tuning."""
BOXES = "cutmix_boxes_in_order (yl yh xl xh, corrected lam)"
TRAINED = {"freeze_positions": False, "freeze_patch_embed": False}
LOSS, GRADIENT, WEIGHT = 1e-12, 1e-10, 1e-11
"""Relative errors that are allowed."""


@dataclass(frozen=True)
class Step:
    """One step: its batch, its draws, and what mixing must make of it.

    Attributes:
        mixed: sum and inner product with the probe vector of the mixed images of each micro-batch.
        targets: (N, classes).
    """

    batch: Batch
    draws: dict[str, Array]
    mixed: Array | None
    targets: Array | None


@dataclass(frozen=True)
class Task:
    """A golden fine-tuning.

    Attributes:
        spec: of the run.
        state: before the first step.
        told: settings.
        golden: arrays.
        first: number of the first step in the schedules.
        steps: the batches.
        steps_per_epoch: of the schedules.
    """

    spec: RunSpec
    state: State
    told: dict[str, Any]
    golden: dict[str, Array]
    first: int
    steps: list[Step]
    steps_per_epoch: int


def moca(run: str) -> Task:
    """One of ``RUNS``. Accumulated micro-batches are one batch: a ViT treats images one by one."""
    settings, arrays = case("finetune_train")
    told = settings["runs"][run]
    keys, start = told["settings"], f"{run}/"
    golden = {name.removeprefix(start): a for name, a in arrays.items() if name.startswith(start)}
    spec = moca_spec(keys, settings)
    state = encoder_state(spec, "encoder_teacher.") | head(settings["classes"], spec.model.features)
    count, parts, boxes = settings["N"], keys["accum"], iter(told[BOXES])
    steps = []
    for step in range(settings["steps"]):
        numbers = range(parts * step, parts * (step + 1))
        images = [normal_images(keys["key"] + i, count, 64, 64) for i in numbers]
        draws = joined([mixing_draws(golden, i, count, boxes) for i in numbers])
        if keys["dp"]:
            draws["drop_path_keep"] = golden["drop_path_keep"][step].astype(np.int64)
        steps.append(_step(images, golden, list(numbers), draws))
    return Task(spec, state, told, golden, 3 * keys["epoch0"], steps, 3)


def moca_spec(keys: dict[str, Any], settings: dict[str, Any]) -> RunSpec:
    """The spec of a run. keys: its settings under the names of the golden case."""
    method = {
        "name": "finetune",
        "classes": settings["classes"],
        "pooling": "mean" if keys["gp"] else "cls",
        "drop_path": keys["dp"],
        "mixing": {"mixup": 0.8, "cutmix": 1.0} if keys["mix"] else {},
    }
    method["mixing"]["smoothing"] = keys["smoothing"]
    optim = {
        "lr": keys["lr"],
        "scale_lr_by": None,
        "weight_decay": keys["wd"],
        "decay_on": "weights",
        "layer_decay": keys["ld"],
        "clip_norm": keys["clip"],
        "warmup_epochs": keys["warm"],
        "end_lr": keys["minlr"],
    }
    train = {"epochs": keys["epochs"], "batch_size": keys["accum"] * settings["N"]}
    return fine_spec({**MOCA_VIT, "fc_norm": keys["fcn"]}, method, optim, train)


def deit() -> Task:
    """MoCo v3's fine-tuning by DeiT's program, with a moving average of the weights."""
    told, golden = case("finetune_deit")
    keys = told["config"]
    method = {
        "name": "finetune",
        "classes": keys["classes"],
        "momentum": keys["ema_decay"],
        "mixing": {name: keys[name] for name in ("mixup", "cutmix")},
    }
    method["mixing"]["smoothing"] = keys["label_smoothing"]
    optim = {
        "lr": keys["lr"],
        "scale_lr_by": None,
        "weight_decay": keys["weight_decay"],
        "decay_on": "weights",
        "per": "epoch",
        "warmup_epochs": keys["warmup_epochs"],
        "warmup_start_lr": keys["warmup_lr"],
        "warmup_shifts_cosine": False,
        "lag_epochs": 1,
        "end_lr": keys["min_lr"],
    }
    train = {"epochs": keys["epochs"], "batch_size": keys["N"]}
    spec = fine_spec(VIT, method, optim, train)
    state = encoder_state(spec, "base_encoder.") | head(keys["classes"], spec.model.features)
    state |= {name.replace("student.", "teacher.", 1): array for name, array in state.items()}
    boxes, steps = iter(told[BOXES]), []
    for step in range(len(golden["loss"])):
        draws = mixing_draws(golden, step, keys["N"], boxes)
        steps.append(_step([normal_images(4200 + step, keys["N"], 64, 64)], golden, [step], draws))
    return Task(spec, state, told, golden, 0, steps, keys["steps_per_epoch"])


def fine_spec(
    model: dict[str, Any], method: dict[str, Any], optim: dict[str, Any], train: dict[str, Any]
) -> RunSpec:
    """A fine-tuning that trains all tensors, in float64."""
    return RunSpec.model_validate(
        {
            "precision": "float64",
            "threads": 1,
            "model": {**model, **TRAINED},
            "method": method,
            "optim": {"name": "adamw", **optim},
            "train": train,
        }
    )


def head(classes: int, width: int) -> State:
    """The classifier's first values."""
    weight = RULES["head:0.01z"]("head.weight", "head.weight", (classes, width))
    bias = RULES["bias:0.02z"]("head.bias", "head.bias", (classes,))
    return {"student.classifier.weight": weight, "student.classifier.bias": bias}


def mixing_draws(
    golden: dict[str, Array], number: int, count: int, boxes: Iterator[Any]
) -> dict[str, Array]:
    """What mixes one micro-batch, as ``core.methods.mixing.draws`` gives it."""
    if "lam_and_is_cutmix" not in golden:
        return {}
    share, cuts = golden["lam_and_is_cutmix"][number]
    box = [-1, -1, -1, -1]
    if cuts:
        box, share = next(boxes)
    return {
        "mix_partner": np.arange(count)[::-1].copy(),
        "mix_share": np.full(count, share),
        "mix_box": np.tile(np.array(box), (count, 1)),
    }


def joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    """The draws of micro-batches as those of one batch."""
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if found:
        count = len(parts[0]["mix_partner"])
        found["mix_partner"] = np.concatenate(
            [part["mix_partner"] + i * count for i, part in enumerate(parts)]
        )
    return found


def _step(
    images: list[Array], golden: dict[str, Array], numbers: list[int], draws: dict[str, Array]
) -> Step:
    labels = np.concatenate([golden["labels"][i] for i in numbers])
    batch = Batch((np.concatenate(images),), np.arange(len(labels)), labels)
    if "mixed_sum" not in golden:
        return Step(batch, draws, None, None)
    mixed = np.stack([golden["mixed_sum"][numbers], golden["mixed_probe"][numbers]])
    return Step(batch, draws, mixed, np.concatenate([golden["targets"][i] for i in numbers]))


def official(name: str) -> str:
    """The golden name of a student's or teacher's tensor."""
    _, part, rest = name.split(".", 2)
    return f"head.{rest}" if part == "classifier" else rest


class Replay:
    """Runs a task and collects in ``wrong`` what differs."""

    def __init__(
        self,
        backend: ModuleType,
        task: Task,
        steps: int | None = None,
        change: Callable[[Engine], object] = lambda engine: None,
    ) -> None:
        self.task, self.wrong = task, list[str]()
        self.plan = Plan(task.spec, task.steps_per_epoch)
        self.names: list[str] = task.told["names"]
        self.engine = backend.build(task.spec, task.state)
        change(self.engine)
        self._evaluation()
        self._state(0)
        for step, given in enumerate(task.steps[:steps]):
            self._step(step, given)
        self.engine.close()

    def _near(self, name: str, got: Any, want: Any, allowed: float) -> None:
        error = relative_error(got, want)
        if not error <= allowed:
            self.wrong.append(f"{name}: {error:.2e} > {allowed:.0e}")

    def _evaluation(self) -> None:
        """The classifier before training, on the first batch."""
        if "eval_logits" in self.task.golden:
            want = self.task.golden["eval_logits"]
            images = self.task.steps[0].batch.views[0][: len(want)]
            self._near("eval logits", self.engine.classify(images)[0], want, LOSS)

    def _step(self, step: int, given: Step) -> None:
        golden, spec = self.task.golden, self.task.spec
        if given.mixed is not None:
            made = finetune.prepare(given.batch, given.draws, spec.method)
            parts = np.split(made.views[0], given.mixed.shape[1])
            got = [[part.sum() for part in parts], [probe(part) for part in parts]]
            self._near(f"mixed/{step}", got, given.mixed, 1e-12)
            self._near(f"targets/{step}", made.targets, given.targets, 1e-14)
        hyper = self.plan.hyper(self.task.first + step)
        self._rates(step, hyper)
        values, gradients = self.engine.trace_step(given.batch, given.draws, hyper)
        parts = len(golden["loss"]) // len(self.task.steps)
        losses = golden["loss"][parts * step : parts * (step + 1)]
        self._near(f"loss/{step}", values["loss"], losses.mean(), LOSS)
        if "logits" in golden:
            logits = np.concatenate(golden["logits"][parts * step : parts * (step + 1)])
            self._near(f"logits/{step}", values["feature/logits"], logits, LOSS)
        self._gradients(step, gradients)
        self._state(step + 1)

    def _rates(self, step: int, hyper: Any) -> None:
        spec, golden = self.task.spec, self.task.golden
        own = {official(n): n for n in self.task.state if n.startswith("student.")}
        for i, group in enumerate(self.task.told["groups"]):
            want = golden["group_lr"][step, i] if "group_lr" in golden else golden["lr"][step]
            for name in group["names"]:
                shape = self.task.state[own[name]].shape
                found = groups.group(own[name], len(shape), spec)
                lr, decay = groups.rates(found, spec.optim, hyper)
                self._near(f"lr {name}/{step}", lr, want, 1e-14)
                self._near(f"decay {name}/{step}", decay, group["weight_decay"], 0.0)

    def _gradients(self, step: int, gradients: State) -> None:
        golden, limit = self.task.golden, self.task.spec.optim.clip_norm
        total = np.sqrt(sum(float((g * g).sum()) for g in gradients.values()))
        factor = 1.0 if limit is None else min(1.0, limit / (total + 1e-6))
        found = {official(name): factor * array for name, array in gradients.items()}
        if set(found) != set(self.names):
            self.wrong.append(f"gradients/{step} of {sorted(set(found) ^ set(self.names))}")
            return
        norms, probes = golden["grad_norm"][step], golden["grad_probe"][step]
        for i, name in enumerate(self.names):
            for kind, got, want in (
                ("norm", np.linalg.norm(found[name]), norms[i]),
                ("probe", probe(found[name]), probes[i]),
            ):
                error = abs(got - want) / norms[i]
                if not error <= GRADIENT:
                    self.wrong.append(f"grad {kind} {name}/{step}: {error:.2e}")

    def _state(self, step: int) -> None:
        golden, state = self.task.golden, self.engine.export_state()
        self._tensors("state", state, "student.", golden, step)
        for name in self.names:
            if f"state/{name}" in golden:
                own = next(n for n in state if n.startswith("student.") and official(n) == name)
                got, want = state[own], golden[f"state/{name}"][step]
                if name.endswith("qkv.bias"):  # the key third has a gradient of rounding alone
                    third = len(want) // 3
                    got, want = (
                        np.delete(got, slice(third, 2 * third)),
                        np.delete(want, slice(third, 2 * third)),
                    )
                self._near(f"whole {name}/{step}", got, want, WEIGHT)
        if "ema_norm" in golden and step:
            self._tensors("ema", state, "teacher.", golden, step - 1)

    def _tensors(
        self, kind: str, state: State, branch: str, golden: dict[str, Array], row: int
    ) -> None:
        found = {official(n): a for n, a in state.items() if n.startswith(branch)}
        norms, probes = golden[f"{kind}_norm"][row], golden[f"{kind}_probe"][row]
        if set(found) != set(self.names):
            self.wrong.append(f"{kind}/{row} of {sorted(set(found) ^ set(self.names))}")
            return
        for i, name in enumerate(self.names):
            error = abs(probe(found[name]) - probes[i]) / max(norms[i], 1e-6)
            error = max(error, abs(np.linalg.norm(found[name]) - norms[i]) / max(norms[i], 1e-6))
            if not error <= WEIGHT:
                self.wrong.append(f"{kind} {name}/{row}: {error:.2e}")


def disagreements(backend: ModuleType, task: Task, **options: Any) -> list[str]:
    """What of a replay differs from the golden numbers by more than is allowed."""
    return Replay(backend, task, **options).wrong
