"""Replays a golden case and says what differs from the numbers recorded there."""

from pathlib import Path

import numpy as np
from support.golden_weights import GOLDEN, description, official_state, probe, views

from triptych.core import config
from triptych.core.config.spec import QueueSpec, RunSpec
from triptych.core.contracts import Batch, Hyper
from triptych.core.formats import FORMATS
from triptych.core.formats.format import Format
from triptych.core.parity import trace

SPECS = GOLDEN / "specs"
CASES = {
    "moco_v3_vit_tiny": 3,
    "moco_v3_vit_s16_224": 1,
    "moco_v3_vit_conv_tiny": 3,
    "moco_v3_resnet50": 1,
    "moco_v2_resnet50": 1,
    "moco_v1_resnet18": 3,
    "moca_vit_tiny": 3,
}
"""Case -> steps that say something in float32 (golden/README.md, section 3)."""
FEATURES = (
    *("q1", "q2", "k1", "k2", "q_raw", "key"),
    *("x_cls_round1", "x_cls_round2", "cross_view_bows"),
)
CODEBOOK = {
    "words": "embedding",
    "pointer": "embedding_ptr",
    "updates": "track_num_batches",
    "distance": "dist_norm",
    "distance_used": "dist_norm_prev",
}
"""Canonical -> golden name of what a step leaves behind."""


def spec_file(case: str) -> Path:
    return SPECS / f"{case}.yaml"


DRAWS = (
    "shuffle_perm",
    "mask_ids_round1",
    "mask_ids_round2",
    "codebook_coin",
    "codebook_image_perm",
    "codebook_token_pick",
)


def format_of(spec: RunSpec) -> Format:
    return FORMATS["moco" if isinstance(spec.method, QueueSpec) else spec.method.name]


def hyper_of(case: str, step: int = 0) -> Hyper:
    settings = description(case)["config"]
    return Hyper(step, settings["lr"], settings["wd"], settings["m"])


def draws_of(case: str, step: int) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{case}.npz") as golden:
        keys = {name: f"{name}/step{step}" for name in DRAWS}
        return {name: golden[key] for name, key in keys.items() if key in golden}


def replay(backend_name, case, precision="float64", steps=None, change=lambda state: state):
    """Keeps what ``summary`` keeps."""
    spec = config.load(spec_file(case), [f"precision={precision}", "threads=2"])
    steps = steps or description(case)["config"]["steps"]
    state = change(format_of(spec).to_canonical(official_state(case), spec))
    index = np.arange(spec.train.batch_size)
    batches = (Batch(views(case, step), index) for step in range(steps))
    record = trace.trace(
        spec,
        backend_name,
        state,
        batches,
        lambda step: draws_of(case, step),
        lambda step: hyper_of(case, step),
        steps,
    )
    return summary(record)


def summary(record) -> dict[str, np.ndarray]:
    """A record with gradients and states reduced to (norm, probe): whole models are large."""
    reduced = {}
    for name, array in record:
        kind, _, rest = name.partition("/")
        if name.startswith("state/optimizer."):
            continue  # the golden numbers have no moments
        if kind in ("grad", "state") and not rest.startswith("memory."):
            norm = float(np.linalg.norm(array.astype(np.float64)))
            reduced[name] = np.array([norm, probe(array)])
        else:
            reduced[name] = array
    return reduced


class Comparison:
    """A float64 replay beside the golden numbers; ``wrong`` says what differs too much.

    A tolerance is that of the project, or a hundred times what the reference moved when its images
    were changed in the last bits, where that is more.
    """

    def __init__(self, got: dict[str, np.ndarray], case: str) -> None:
        self.got, self.told = got, description(case)
        spec = config.load(spec_file(case))
        self.official = {o: c for c, o in format_of(spec).names(spec).items()}
        self.spec = spec
        self.noise: set[str] = set()
        self.wrong: list[str] = []
        with np.load(GOLDEN / f"{case}.npz") as golden:
            self.golden = dict(golden)
        if spec.method.name == "moca":
            self._arrays("feature/tokens_ln", "feat_student_tokens", 1e-10)
        else:
            self._arrays("feature/backbone", "feat_backbone", 1e-10)
            self._arrays("feature/proj", "feat_proj", 1e-10)
        for step in range(len(got["loss"])):
            self._step(step)
        for step in range(len(got["loss"]) + 1):
            self._state(step)

    def _allowed(self, step: int, kind: str, least: float) -> float:
        deviations = self.told["deviation"]["fp64_images_times_1_plus_2pow-45"]
        return max(least, 100.0 * deviations[step][kind])

    def _check(self, name: str, error: float, allowed: float) -> None:
        if not error <= allowed:
            self.wrong.append(f"{name}: {error:.2e} > {allowed:.0e}")

    def _arrays(self, ours: str, theirs: str, allowed: float) -> None:
        want = self.golden[theirs]
        self._check(theirs, np.abs(self.got[ours] - want).max() / np.abs(want).max(), allowed)

    def _step(self, step: int) -> None:
        loss = self.golden["loss"][step]
        error = abs(self.got["loss"][step] - loss) / loss
        self._check(f"loss/{step}", error, self._allowed(step, "loss_rel", 1e-10))
        within = self._allowed(step, "grad_median", 1e-10)
        for name in FEATURES:
            if f"{name}/step{step}" in self.golden:
                self._arrays(f"feature/{name}/step{step}", f"{name}/step{step}", within)
        if f"queue/step{step}" in self.golden:
            self._queue(step)
        if f"after_embedding/step{step}" in self.golden:
            self._codebook(step)
        self._gradients(step)

    def _queue(self, step: int) -> None:
        golden, got = self.golden, self.got
        for name in ("acc1", "acc5"):
            gap = abs(got[f"metric/{name}"][step] - golden[f"{name}/step{step}"].item())
            self._check(f"{name}/{step}", gap, 1e-9)
        after = got[f"state/memory.queue/step{step + 1}"]
        self._check(f"queue/{step}", np.abs(after - golden[f"queue/step{step}"]).max(), 1e-10)
        # What a step saw: the queue from before its keys went in.
        query = got[f"feature/q_raw/step{step}"]
        query = query / np.linalg.norm(query, axis=1, keepdims=True) / self.spec.method.temperature
        positive = (query * got[f"feature/key/step{step}"]).sum(1, keepdims=True)
        logits = np.hstack([positive, query @ got[f"state/memory.queue/step{step}"]])
        gap = np.abs(logits - golden[f"logits/step{step}"]).max()
        self._check(f"logits/{step}", gap / np.abs(logits).max(), 1e-9)

    def _codebook(self, step: int) -> None:
        golden, got = self.golden, self.got
        for name in ("loss_img", "loss_loc"):
            want = golden[f"{name}/step{step}"].item()
            self._check(f"{name}/{step}", abs(got[f"metric/{name}"][step] - want) / want, 1e-10)
        for ours, theirs in CODEBOOK.items():
            after = got[f"state/memory.{ours}/step{step + 1}"]
            gap = np.abs(after.reshape(-1) - golden[f"after_{theirs}/step{step}"].reshape(-1)).max()
            self._check(f"{ours}/{step}", gap, 1e-10)
        norms = [a[0] for n, a in got.items() if n.startswith("grad/") and n.endswith(f"p{step}")]
        want = golden[f"clip_total_norm/step{step}"].item()
        gap = abs(float(np.linalg.norm(norms)) - want) / want
        self._check(f"clip_total_norm/{step}", gap, 1e-10)

    def _gradients(self, step: int) -> None:
        norms, probes = self.golden["grad_norm"][step], self.golden["grad_probe"][step]
        for i, name in enumerate(self.told["trainable_names"]):
            if norms[i] <= 1e-9 * np.linalg.norm(norms):
                self.noise.add(name)
                continue
            gap = abs(self.got[f"grad/{self.official[name]}/step{step}"][1] - probes[i])
            allowed = self._allowed(step, "grad_max", 1e-8)
            self._check(f"grad {name}/{step}", gap / norms[i], allowed)

    def _state(self, step: int) -> None:
        for i, entry in enumerate(self.told["state"]):
            name = entry["name"]
            norm, want = (self.golden[f"state_{kind}"][step, i] for kind in ("norm", "probe"))
            array = self.got[f"state/{self.official[name]}/step{step}"]
            # Queue, codebook and pointer are whole in the record.
            own = probe(array) if name.startswith(("queue", "bow_extractor")) else array[1]
            # AdamW makes steps of any size of a gradient that is only rounding.
            source = name.replace("momentum_encoder", "base_encoder")
            source = source.replace("encoder_teacher", "encoder")
            least = 1e-6 if source in self.noise else 1e-8
            allowed = self._allowed(max(step - 1, 0), "state_max", least)
            # A running mean behind a norm without shift is zero but for rounding.
            self._check(f"state {name}/{step}", abs(own - want) / max(norm, 1e-6), allowed)


def disagreements(got: dict[str, np.ndarray], case: str) -> list[str]:
    """What of a float64 replay differs from the golden numbers by more than is allowed."""
    return Comparison(got, case).wrong
