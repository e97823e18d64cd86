"""Training that goes on from a file of another system, as the system itself went on.

The limits are those of tests/golden/formats/README.md; moments that are forgotten, given to a
neighbour, or counted anew move the loss of the second step by 1e-4 or more.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import relative_error
from support import foreign
from support.marks import marked
from support.resuming import BINARY, LIMITS, Resumed, worst, written

from triptych.core import config, formats, methods
from triptych.core.cli import main
from triptych.core.config.spec import RunSpec
from triptych.core.contracts import Batch, Hyper, State
from triptych.core.files import reading, saving
from triptych.core.files.tree import Stored
from triptych.core.formats import FORMATS
from triptych.core.formats.format import Output, facts_of
from triptych.core.optim import scaling
from triptych.core.parameters import initial_state
from triptych.core.parity.trace import trace
from triptych.core.training.resume import Start, find_start

FILES = Path(__file__).parent / "golden" / "formats"
V3 = "moco_v3_vit_torch1.9.pth.tar"
LARS = "mmpretrain_mocov3_resnet18_lars_epoch_1.pth"
CASES: dict[str, list[str]] = {
    LARS: [],
    "moco_v2_resnet18_torch1.9.pth.tar": [],
    V3: ["model.heads=4"],
    "moca_full_vit_torch2.pth": ["model.heads=3", "method.decoder_heads=2"],
}
"""File -> keys of the spec that it does not show."""
RESNETS = [file for file in CASES if "resnet" in file]


def beyond(errors: list, limits: dict[str, float]) -> list[str]:
    """The worst error of each kind that is above its limit."""
    return [
        f"{e.kind} {e.name} step {e.step}: {e.value:.1e}"
        for e in worst(errors).values()
        if not e.value <= limits[e.kind]
    ]


@pytest.mark.parametrize("file", marked(CASES, RESNETS, pytest.mark.one_backend))
def test_two_steps_are_those_of_the_system(backend, backend_name, file, tmp_path):
    resumed = Resumed(FILES / file)
    got = resumed.replay(backend_name, tmp_path, CASES[file])
    errors = resumed.errors(got, {})
    assert {e.kind for e in errors} >= {"loss", "grad", "state", "moment"}
    assert beyond(errors, LIMITS) == []
    assert resumed.left == ({"momentum_encoder.steps"} if file == LARS else set())


@pytest.mark.parametrize(
    "file", marked(foreign.TRAINED, ("paddlefleetx_moco_v2_bottleneck",), pytest.mark.one_backend)
)
def test_two_steps_are_those_of_paddle_and_libai(backend, backend_name, file, tmp_path):
    """With numbers that float32 holds exactly, since their kernels take some as float32."""
    facts = foreign.facts_of(file)
    resumed = Resumed(FILES / file, binary=True, checkpoint=foreign.path_of(file, tmp_path))
    got = resumed.replay(backend_name, tmp_path, [f"{key}={facts[key]}" for key in facts])
    errors = resumed.errors(got, facts)
    assert {e.kind for e in errors} == {"loss", "grad", "state", "moment"}
    assert beyond(errors, BINARY) == [] and resumed.left == set()
    remark = "batch_norm.running_variance: biased, as Paddle's kernels for CPUs"
    assert (remark in "\n".join(resumed.said)) == ("libai" not in file)


def test_what_a_run_does_in_another_way_than_the_system_is_said():
    path = FILES / "plsc_moco_v3_vit.pd"
    said: list[str] = []
    keys = ["model.heads=3", "method.teacher_statistics=own"]
    formats.load_training_state(path, formats.read_spec(path, keys), said.append)
    line = f"{path}: method.teacher_statistics: own; PLSC (PaddlePaddle/PLSC) has averaged"
    assert said[-1] == line


def forgotten(state: State) -> State:
    return {n: np.zeros_like(a) if ".exp_avg" in n else a for n, a in state.items()}


def exchanged(state: State) -> State:
    """The moments of two parameters of one shape."""
    a, b = (f"optimizer.exp_avg_sq.student.encoder.blocks.0.norm{i}.weight" for i in (1, 2))
    return {**state, a: state[b], b: state[a]}


def transposed(state: State) -> State:
    name = "optimizer.exp_avg_sq.student.encoder.blocks.0.attn.proj.weight"
    return {**state, name: state[name].T.copy()}


def restarted(state: State) -> State:
    return {**state, "optimizer.step": np.int64(0)}


def unchanged(state: State) -> State:
    return state


@pytest.mark.parametrize("change", [unchanged, forgotten, exchanged, transposed, restarted])
def test_each_fault_of_the_moments_shows(change, tmp_path):
    resumed = Resumed(FILES / V3)
    spec = formats.read_spec(FILES / V3, CASES[V3])
    state = change(formats.load_training_state(FILES / V3, spec, print))
    written(FORMATS["moco_v3"], state, spec, tmp_path / "w.pth")
    got = resumed.replay("numpy", tmp_path, CASES[V3], weights=tmp_path / "w.pth")
    loss = worst(resumed.errors(got, {}))["loss"]
    assert (loss.value <= LIMITS["loss"]) == (change is unchanged)


# -------------------------------------------------------------------------- from the commands


def test_a_trace_takes_its_spec_from_the_file(tmp_path, capsys):
    keys = ["model.heads=4", "train.batch_size=2", "data={name: digits}"]
    out = str(tmp_path / "t.npz")
    words = ["--backend", "numpy", "--steps", "1", "-o", *keys, "--output", out]
    assert main(["parity", "trace", "--weights", str(FILES / V3), *words]) == 0
    with np.load(out) as record:
        assert int(record["state/optimizer.step/step0"]) == 2
        assert record["state/optimizer.exp_avg.student.encoder.cls_token/step0"].any()
    assert main(["parity", "trace", *words]) != 0
    assert "expected -c SPEC or --weights PATH" in capsys.readouterr().err


def test_a_run_goes_on_from_a_file(tmp_path):
    said: list[str] = []
    spec = formats.read_spec(FILES / V3, CASES[V3])
    begin, state = find_start(spec, tmp_path / "run", str(FILES / V3), {}, said.append, 10)
    assert begin == Start(step=2, whole=True, foreign=2)
    assert state["optimizer.exp_avg.student.encoder.cls_token"].any()
    assert said == [f"going on from {FILES / V3} (MoCo v3 (facebookresearch/moco-v3)), step 2; "
                    "the order of the images is that of this run"]  # fmt: skip
    # SGD counts no updates, but the file counts epochs.
    path = FILES / "moco_v2_resnet18_torch1.9.pth.tar"
    spec, epoch = formats.read_spec(path), reading.read(path).tree["epoch"]
    begin, state = find_start(spec, tmp_path / "run", str(path), {}, said.append, 10)
    assert epoch and begin.step == state["optimizer.step"] == 10 * epoch


def test_a_run_goes_on_from_a_converted_checkpoint(tmp_path):
    keys = ["-o", *CASES[V3]]
    assert main(["convert", str(FILES / V3), str(tmp_path / "w"), "--to", "canonical", *keys]) == 0
    spec = formats.read_spec(FILES / V3, [*CASES[V3], "optim.lr=1", "train.batch_size=4"])
    begin, state = find_start(spec, tmp_path / "run", str(tmp_path / "w"), {}, print)
    assert begin == Start(step=2, whole=True, foreign=2)
    again = formats.load_training_state(FILES / V3, spec, print)
    assert state.keys() == again.keys()
    assert all(np.array_equal(state[name], again[name]) for name in again)


def test_a_run_counts_its_own_steps_and_has_some_to_do(tmp_path, capsys):
    """The rate of a run is not that of the updates that the file brings, here of an epoch."""
    pytest.importorskip("torch")
    spec = formats.read_spec(FILES / V3, [*CASES[V3], "data={name: digits}", "evaluate.every=0"])
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    words = ["train", "-c", str(tmp_path / "spec.json"), "--backend", "torch"]
    words += ["--output", str(tmp_path / "run"), "-o", "train.batch_size=4", "train.epochs=null"]
    assert main([*words, "train.steps=2", "--resume", str(FILES / V3)]) == 2
    error = capsys.readouterr().err
    assert "the file holds 2 updates, and the run ends after 2; raise train.steps" in error
    assert not (tmp_path / "run").exists()
    assert main([*words, "train.steps=4", "--resume", str(FILES / V3)]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    rate = 2 * 4 / result["seconds"]
    assert result["steps"] == 4 and result["images_per_second"] == pytest.approx(rate)
    own = config.load(tmp_path / "run" / "spec.yaml")
    begin, _ = find_start(own, tmp_path / "run", "auto", result, print)
    assert (begin.step, begin.foreign) == (4, 2)


# ------------------------------------------------------------------------------ the other way

VIT = {"name": "vit", "width": 16, "depth": 2, "heads": 2, "patch_size": 4, "image_size": 32}
RESNET = {"name": "resnet", "block": "basic", "depths": [1, 1, 1, 1], "width": 2,
          "image_size": 32}  # fmt: skip
SGD = {"name": "sgd", "lr": 0.02, "momentum": 0.8}
RUNS = {
    "moco v2": ("moco", RESNET, {"name": "moco_v2", "output_dim": 8, "queue_size": 8}, SGD),
    "moco_v3 ViT": ("moco_v3", VIT, {"name": "moco_v3", "hidden_dim": 16, "output_dim": 8},
                    {"name": "adamw", "betas": [0.8, 0.95]}),
    "moco_v3 ResNet": ("moco_v3", RESNET, {"name": "moco_v3", "hidden_dim": 16, "output_dim": 8},
                       {"name": "lars"}),
    "paddlefleetx": ("paddlefleetx", RESNET, {"name": "moco_v1", "output_dim": 8, "queue_size": 8},
                     SGD),
    "plsc": ("plsc", VIT, {"name": "moco_v3", "hidden_dim": 16, "output_dim": 8},
             {"name": "adamw", "betas": [0.8, 0.95]}),
    "libai": ("libai", VIT, {"name": "moco_v3", "hidden_dim": 16, "output_dim": 8,
                             "last_norm_affine": True},
              {"name": "adamw", "betas": [0.8, 0.95], "decay_on": "matrices"}),
    "mmpretrain": ("mmpretrain", RESNET, {"name": "moco_v3", "hidden_dim": 16, "output_dim": 8,
                                          "teacher_statistics": "copied"},
                   {"name": "lars", "form": "mmpretrain"}),
    "moca": ("moca", {**VIT, "freeze_patch_embed": False},
             {"name": "moca", "words": 16, "new_words": 4, "early_layer": 1, "decoder_width": 8,
              "decoder_depth": 1, "decoder_heads": 2},
             {"name": "adamw", "generator_lr": 1e-3, "decay_on": "matrices", "clip_norm": 0.5}),
}  # fmt: skip
"""A format, and the sections of a run that its files can hold."""
DONE, MORE = 2, 2


def run_spec(case: str, done: int = DONE) -> RunSpec:
    _, model, method, optim = RUNS[case]
    return RunSpec.model_validate(
        {"model": model, "method": method, "optim": optim, "precision": "float64", "threads": 2,
         "train": {"steps": done + MORE, "batch_size": 4}}
    )  # fmt: skip


def batches(spec: RunSpec, first: int, last: int) -> Iterator[Batch]:
    for step in range(first, last):
        rng = np.random.default_rng(step)
        views = rng.standard_normal((2, spec.train.batch_size, 3, *spec.model.size))
        yield Batch(tuple(views), np.arange(spec.train.batch_size))


def states(spec: RunSpec, backend: str, state: State, first: int, last: int) -> list[State]:
    """The states before the steps from ``first`` to ``last``, and the one after them."""
    method = methods.METHODS[spec.method.name]
    record = trace(
        spec, backend, state, batches(spec, first, last), lambda k: method.draws(spec, first + k),
        lambda k: Hyper(first + k, 0.01, 0.05, 0.9), last - first,
    )  # fmt: skip
    found: list[State] = [{} for _ in range(first, last + 1)]
    for name, array in record:
        kind, _, rest = name.partition("/")
        if kind == "state":
            tensor, _, step = rest.rpartition("/step")
            found[int(step)][tensor] = array
    return found


@pytest.mark.parametrize("case", RUNS)
def test_a_run_written_for_a_system_goes_on_as_if_never_interrupted(case, tmp_path):
    goes_on(case, DONE, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("case", RUNS)
def test_a_run_of_fifty_steps_goes_on_as_if_never_interrupted(case, tmp_path):
    goes_on(case, 50, tmp_path)


def goes_on(case: str, done: int, folder: Path) -> None:
    """Trains, writes, reads and trains on; compares with the run in one piece."""
    spec = run_spec(case, done)
    start = {n: a.astype(np.float64) if a.dtype.kind == "f" else a
             for n, a in initial_state(spec).items()}  # fmt: skip
    run = states(spec, "numpy", start, 0, done + MORE)
    written(FORMATS[RUNS[case][0]], run[done], spec, folder / "w.pth")
    read = formats.load_training_state(folder / "w.pth", spec, print)
    counted = spec.optim.name == "adamw"
    lost = [] if counted else ["optimizer.step"]
    if FORMATS[RUNS[case][0]].remarks:
        lost += [name for name in run[done] if name.endswith("num_batches_tracked")]  # Paddle
    names = [name for name in run[done] if name not in lost]
    assert all(np.array_equal(read[name], run[done][name]) for name in names)
    end = states(spec, "numpy", read, done, done + MORE)[-1]
    assert max(relative_error(end[name], run[-1][name]) for name in names) <= 1e-10


@pytest.mark.parametrize(
    ("name", "sections"),
    [("paddlefleetx", RUNS["paddlefleetx"]), ("mmpretrain", RUNS["mmpretrain"]),
     ("moco", RUNS["moco v2"]), ("moca", RUNS["moca"])],
)  # fmt: skip
def test_a_written_file_says_how_many_epochs_are_done(name, sections, tmp_path):
    spec = run_spec(next(case for case, run in RUNS.items() if run is sections))
    tree = {n: Stored.of(array) for n, array in initial_state(spec).items()}
    made = FORMATS[name]
    tensors, _ = made.layout(spec).table.from_canonical(tree, facts_of(spec))
    container, content = made.output(Output(made.layout(spec), tensors, {}, spec, 30, 3))
    saving.write(tmp_path / "w", content, container)
    assert made.epochs(reading.read(tmp_path / "w")) == 3


def test_epochs_that_the_systems_themselves_have_counted():
    for file, epochs in ((LARS, 1), ("paddlefleetx_moco_v2_bottleneck", 2)):
        content = reading.read(FILES / file)
        name = "mmpretrain" if file == LARS else "paddlefleetx"
        assert FORMATS[name].epochs(content) == epochs


def test_a_file_with_an_empty_optimizer_has_one_line(tmp_path):
    tree = reading.read(FILES / V3).tree
    optimizer = {**tree["optimizer"], "state": {}}
    saving.write(tmp_path / "w.pth", {**tree, "optimizer": optimizer}, "torch")
    said: list[str] = []
    spec = formats.read_spec(FILES / V3, CASES[V3])
    state = formats.load_training_state(tmp_path / "w.pth", spec, said.append)
    assert said == [
        f"{tmp_path}/w.pth: optimizer: starts anew at 0: the file holds neither moments nor a "
        "number of updates"
    ]
    assert state["optimizer.step"] == 0
    some = {key: value for key, value in tree["optimizer"]["state"].items() if key > 30}
    optimizer = {**tree["optimizer"], "state": some}
    saving.write(tmp_path / "w.pth", {**tree, "optimizer": optimizer}, "torch")
    said.clear()
    formats.load_training_state(tmp_path / "w.pth", spec, said.append)
    assert len(said) == 2 and all(" more: starts anew at 0" in line for line in said)


# ------------------------------------------------------------------------- the scale of a loss


def with_scaler(folder, scaler):
    """MoCo v3's file with another state of the loss scaler."""
    path = folder / "scaled.pth"
    saving.write(path, {**reading.read(FILES / V3).tree, "scaler": scaler}, "torch")
    return path


def scale_in(path, case, precision, say=print):
    """What a run in this precision takes over of a file's loss scale."""
    spec = formats.read_spec(path, [*CASES[case], f"precision={precision}"])
    _, state = find_start(spec, path.parent / "run", str(path), {}, say)
    assert spec.precision == precision and state["optimizer.step"] > 0
    return [int(state[name]) for name in scaling.ENTRIES if name in state]


@pytest.mark.parametrize("case", [V3, "moca_full_vit_torch2.pth"])
def test_a_run_in_float16_takes_over_the_scale_of_the_loss(case):
    assert scale_in(FILES / case, case, "float16") == [2**16, 2, 0]
    assert scale_in(FILES / case, case, "bfloat16") == []


@pytest.mark.parametrize(
    ("scale", "good", "taken"),
    [
        (1024.0, 1999, [1024, 1999, 0]),
        (2.0**32, 0, [2**32, 0, 0]),
        *(
            (scale, 7, [2**16, 0, 0])
            for scale in (0.5, 1e3, 2.0**33, float("nan"), "x", None, True)
        ),
        *((1024.0, good, [2**16, 0, 0]) for good in (2000, -1, "x", None)),
    ],
)
def test_a_scale_that_no_run_has_begins_anew(scale, good, taken, tmp_path):
    path = with_scaler(tmp_path, {"scale": scale, "growth_factor": 2.0, "_growth_tracker": good})
    said = []
    assert scale_in(path, V3, "float16", said.append) == taken
    told = any("a run in float16 begins its scale anew" in line for line in said)
    assert told == (taken == [2**16, 0, 0])


def test_a_scaler_that_was_not_in_use_gives_no_scale(tmp_path):
    said = []
    assert scale_in(with_scaler(tmp_path, {}), V3, "float16", said.append) == [2**16, 0, 0]
    assert not any("begins its scale anew" in line for line in said)


def test_a_scale_comes_back_from_a_checkpoint_and_pytorch_loads_it(tmp_path):
    torch = pytest.importorskip("torch")
    path, keys = with_scaler(tmp_path, {"scale": 512.0, "_growth_tracker": 30}), CASES[V3]
    words = ["convert", str(path), str(tmp_path / "own"), "--to", "canonical"]
    assert main([*words, "-o", *keys, "precision=float16"]) == 0
    assert scale_in(tmp_path / "own", V3, "float16") == [512, 30, 0]
    for source, name in ((tmp_path / "own", "again.pth"), (path, "same.pth")):
        words = ["convert", str(source), str(tmp_path / name), "--to", "moco_v3"]
        assert main([*words, *(["-o", *keys] if source == path else [])]) == 0
        scaler = torch.amp.GradScaler("cpu")
        scaler.load_state_dict(torch.load(tmp_path / name, weights_only=True)["scaler"])
        assert scaler.get_scale() == 512.0 and scaler.state_dict()["_growth_tracker"] == 30
    words[2:] = [str(tmp_path / "single"), "--to", "canonical", "-o", *keys]
    assert main(words) == 0
    assert scale_in(tmp_path / "single", V3, "float32") == []
