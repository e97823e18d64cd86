"""The state of an optimizer in files of other systems: read, written, and continued by PyTorch."""

import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import assert_close
from support.resuming import written

from triptych.core import formats
from triptych.core.config.spec import AdamWSpec, RunSpec
from triptych.core.contracts import Hyper, State
from triptych.core.errors import UserError
from triptych.core.files import reading
from triptych.core.files.tree import Content, Malformed, Stored
from triptych.core.formats import FORMATS, moments
from triptych.core.formats.changes import TRANSPOSED
from triptych.core.formats.continuing import training_state
from triptych.core.formats.detection import Source, recognise
from triptych.core.formats.entries import entries
from triptych.core.formats.moments import KINDS, STATISTICS, Moments, parameters, read
from triptych.core.formats.rules import Rule, Table
from triptych.core.formats.specs import spec_of
from triptych.core.optim import groups
from triptych.core.reference.optim import adamw, sgd

FILES = Path(__file__).parent / "golden" / "formats"
MOMENTS = json.loads((FILES / "moments.json").read_text())
"""File -> tensor -> kind of moment -> its hash, by the object itself in the system's optimizer."""
OVERRIDES = {
    "moco_v2_resnet18_torch1.9.pth.tar": ("model.image_size=64",),
    "moco_v3_vit_torch1.9.pth.tar": ("model.heads=4",),
    "moca_full_vit_torch2.pth": ("model.heads=3", "method.decoder_heads=2"),
}
V3 = "moco_v3_vit_torch1.9.pth.tar"


@lru_cache(maxsize=4)
def source(name: str) -> Source:
    return recognise(reading.read(FILES / name))


def digest(tensor: Stored) -> str:
    return hashlib.sha256(np.ascontiguousarray(tensor.bits()).tobytes()).hexdigest()[:16]


def kinds(found: Source) -> dict[str, str]:
    """Canonical kind of moment, by the file's."""
    name = found.optimizer.name
    return dict(zip(found.format.moments.optimizers[name], KINDS[name], strict=True))


# --------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("file", MOMENTS)
def test_each_moment_is_at_its_parameter(file: str) -> None:
    found = source(file)
    tensors = {name: t for name, t in found.optimizer.tensors.items() if name not in moments.COUNTS}
    assert len(tensors) == sum(map(len, MOMENTS[file].values()))
    ours = {theirs: name for name, (theirs, *_) in found.renamed.origin.items()}
    own = kinds(found)
    wrong = [
        (name, kind)
        for name, hashes in MOMENTS[file].items()
        for kind, value in hashes.items()
        if digest(tensors[f"optimizer.{own[kind]}.{ours[name.removeprefix('module.')]}"]) != value
    ]
    assert wrong == []


def test_the_file_shows_the_optimizer_of_its_run() -> None:
    spec = {file: formats.read_spec(FILES / file, o).optim for file, o in OVERRIDES.items()
            if "resnet" not in file}  # fmt: skip
    adamw, moca = spec.values()
    assert (adamw.name, adamw.lr, adamw.betas, adamw.decay_on) == (
        "adamw", 0.00045, (0.9, 0.999), "all",
    )  # fmt: skip
    assert (moca.decay_on, moca.generator_lr, moca.weight_decay, moca.clip_norm) == (
        "matrices", 1e-4, 0.05, 0.1,
    )  # fmt: skip


def tree_with(optimizer: object) -> Content:
    content = reading.read(FILES / V3)
    return replace(content, tree={**content.tree, "optimizer": optimizer})


def refusal(optimizer: dict) -> str:
    with pytest.raises(UserError) as caught:
        _ = recognise(tree_with(optimizer)).optimizer
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{FILES / V3}: moco_v3: ")
    return line


def test_what_does_not_fit_is_refused_by_name() -> None:
    optimizer = reading.read(FILES / V3).tree["optimizer"]
    state, (group,) = optimizer["state"], optimizer["param_groups"]
    fewer = {**optimizer, "param_groups": [{**group, "params": group["params"][:-1]}]}
    assert "numbers 77 parameters, the model has 78" in refusal(fewer)
    swapped = {**optimizer, "state": {**state, 6: state[7], 7: state[6]}}
    assert "exp_avg of 6 has the shape (72,)" in refusal(swapped)
    assert "base_encoder.blocks.0.attn.qkv.weight (72, 24)" in refusal(swapped)
    later = {**optimizer, "state": {**state, 6: {**state[6], "step": 9}}}
    assert "different numbers of updates: 2, 9" in refusal(later)
    other = {**optimizer, "param_groups": [{**group, "betas": None, "momentum": 0.9}]}
    del other["param_groups"][0]["betas"]
    assert "expected the state of adamw or lars" in refusal(other)
    mixed = {**optimizer, "state": {**state, "": state[6]}}
    assert "0 is the key of no parameter" in refusal(mixed)
    assert "999 is the key of no parameter" in refusal(
        {**optimizer, "state": {**state, 999: state[6]}}
    )


@pytest.mark.parametrize("decay", [{"a": 1}, None, "0.1", float("nan")])
def test_a_decay_that_is_no_number_is_refused(decay: object) -> None:
    optimizer = reading.read(FILES / V3).tree["optimizer"]
    (group,) = optimizer["param_groups"]
    found = recognise(tree_with({**optimizer, "param_groups": [{**group, "weight_decay": decay}]}))
    with pytest.raises(UserError, match=r"has weight_decay .* expected a number; give -c SPEC"):
        spec_of(found, ["model.heads=4"])


def test_what_a_file_lacks_starts_anew_and_is_said() -> None:
    optimizer = reading.read(FILES / V3).tree["optimizer"]
    state = {key: dict(value) for key, value in optimizer["state"].items()}
    state[0]["max_exp_avg_sq"] = state[0]["exp_avg_sq"]
    del state[0]["exp_avg"], state[4]
    found = recognise(tree_with({**optimizer, "state": state}))
    spec = formats.read_spec(FILES / V3, OVERRIDES[V3])
    said: list[str] = []
    state = training_state(found.optimizer, spec, said.append)
    norm = "student.encoder.blocks.0.norm1.weight"
    assert not state[f"optimizer.exp_avg_sq.{norm}"].any()
    assert state["optimizer.exp_avg_sq.student.encoder.cls_token"].any()
    assert said == [
        "left out: max_exp_avg_sq of 1 parameters: no optimizer here has it",
        "optimizer.exp_avg.student.encoder.cls_token: starts anew at 0: the file holds none",
        f"optimizer.exp_avg.{norm}: starts anew at 0: the file holds none",
        f"optimizer.exp_avg_sq.{norm}: starts anew at 0: the file holds none",
    ]


def test_the_momentum_of_lars_takes_the_form_of_the_run() -> None:
    name = "optimizer.momentum_buffer.student.encoder.conv1.weight"
    run = {"model": {"name": "resnet18", "width": 2}, "train": {"steps": 1},
           "method": {"name": "moco_v3", "hidden_dim": 8, "output_dim": 8}}  # fmt: skip
    buffer = Stored.of(np.full((2, 3, 7, 7), 3.0, np.float32))
    group = moments.Options({"lr": 0.5}, ())
    for form, values in (("mmpretrain", 3.0), ("moco_v3", 6.0)):
        spec = RunSpec.model_validate({**run, "optim": {"name": "lars", "form": form}})
        found = moments.Optimizer("lars", {name: buffer}, (group,), "mmpretrain")
        assert np.array_equal(training_state(found, spec, str)[name], np.full((2, 3, 7, 7), values))
    with pytest.raises(UserError, match=r"optim.form: moco_v3: .* needs the rate, which is None"):
        training_state(moments.Optimizer("lars", {name: buffer}, (), "mmpretrain"), spec, print)


def test_another_optimizer_or_model_is_refused() -> None:
    other = formats.read_spec(FILES / V3, [*OVERRIDES[V3], "optim={name: sgd}"])
    with pytest.raises(UserError, match=r"optim.name: sgd: the file holds the state of adamw"):
        formats.load_training_state(FILES / V3, other, print)
    spec = formats.read_spec(FILES / V3, OVERRIDES[V3])
    found = source(V3).optimizer
    more = {**found.tensors, "optimizer.exp_avg.student.encoder.pos_embed": Stored.of(np.ones(1))}
    with pytest.raises(UserError, match=r"pos_embed: the run does not train this tensor"):
        training_state(replace(found, tensors=more), spec, print)


# ---------------------------------------------------------------- Paddle's and OneFlow's own forms


def zeros(*shape: int, unique: str = "") -> Stored:
    return Stored.of(np.zeros(shape, np.float32), unique=unique)


def test_paddles_powers_tell_the_number_of_updates() -> None:
    tree = {
        "linear_0.w_0_moment1_0": zeros(2, 3),
        "linear_0.w_0_moment2_0": zeros(2, 3),
        "linear_0.w_0_beta1_pow_acc_0": Stored.of(np.float32([0.9**21])),
        "linear_0.w_0_beta2_pow_acc_0": Stored.of(np.float32([0.999**21])),
        "LR_Scheduler": {"last_epoch": 3},
    }
    found = entries(tree)
    assert found.steps == {20}
    assert {kind: [*values] for kind, values in found.moments.items()} == {
        "moment1": ["linear_0.w_0"],
        "moment2": ["linear_0.w_0"],
    }
    other = {**tree, "linear_0.w_0_beta2_pow_acc_0": Stored.of(np.float32([0.99**21]))}
    assert len(entries(other).steps) == 2
    for power in (np.zeros(0, np.float32), np.ones(2, np.float32), np.ones(1, np.complex64)):
        with pytest.raises(Malformed, match="beta1_pow_acc is no number"):
            entries({**tree, "linear_0.w_0_beta1_pow_acc_0": Stored.of(power)})


def test_oneflow_counts_once_for_all_and_hides_its_options() -> None:
    group = {"_options": {"lr": 0.1, "betas": (0.9, 0.999)}, "_enable_clip_grad": True,
             "params": [0]}  # fmt: skip
    found = entries({"state": {"step": 7, 0: {"exp_avg": zeros(3)}}, "param_groups": [group]})
    assert found.steps == {7}
    assert found.groups[0].options["betas"] == (0.9, 0.999)
    assert entries({"epoch": 3}) is None and entries(None) is None
    with pytest.raises(Malformed, match=r"number of updates is 2\.5"):
        entries({"state": {0: {"step": 2.5}}, "param_groups": []})
    with pytest.raises(Malformed, match="names no parameters"):
        entries({"state": {}, "param_groups": [{"lr": 1.0}]})
    with pytest.raises(Malformed, match="_options that are no dictionary"):
        entries({"state": {}, "param_groups": [{**group, "_options": [1]}]})


RULES = Table(Rule("fc.weight", "student.projector.0.weight", TRANSPOSED),
              Rule("fc.{leaf}", "student.projector.0.{leaf}"))  # fmt: skip
PADDLE = Moments({"sgd": ("velocity",), "adamw": ("moment1", "moment2")}, link="flat")


def test_links_by_unique_name_and_changes_of_layout() -> None:
    weight, bias = np.arange(6, dtype=np.float32).reshape(3, 2), np.float32([7, 8])
    model = {"fc.weight": zeros(3, 2, unique="linear_4.w_0"),
             "fc.bias": zeros(2, unique="linear_4.b_0")}  # fmt: skip
    tree = {"optimizer": {"linear_4.b_0_velocity_0": Stored.of(bias),
                          "linear_4.w_0_velocity_0": Stored.of(weight)}}  # fmt: skip
    renamed = RULES.to_canonical(model, {})
    found = read(PADDLE, Content(Path("x"), "paddle", tree), model, renamed, RULES, {})
    assert found.name == "sgd"
    prefix = "optimizer.momentum_buffer.student.projector.0."
    assert np.array_equal(found.tensors[f"{prefix}weight"].array(), weight.T)
    assert np.array_equal(found.tensors[f"{prefix}bias"].array(), bias)
    strange = {"optimizer": {"linear_5.w_0_velocity_0": zeros(3, 2)}}
    with pytest.raises(Malformed, match=r"'linear_5.w_0' is the key of no parameter"):
        read(PADDLE, Content(Path("x"), "paddle", strange), model, renamed, RULES, {})


# --------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("file", [name for name in MOMENTS if "resnet" not in name])
def test_a_file_comes_back_as_it_was(file: str, tmp_path: Path) -> None:
    spec = formats.read_spec(FILES / file, OVERRIDES[file])
    found = source(file)
    state = formats.load_training_state(FILES / file, spec, print)
    written(found.format, state, spec, tmp_path / "w.pth")
    before, after = (reading.read(path).tree for path in (FILES / file, tmp_path / "w.pth"))
    model = "model" if "model" in before else "state_dict"
    assert bits(before[model]) == bits(after[model])
    assert parameter_names(before[model]) == parameter_names(after[model])
    old, new = before["optimizer"], after["optimizer"]
    assert [group["params"] for group in old["param_groups"]] == [
        group["params"] for group in new["param_groups"]
    ]
    assert moment_bits(old) == moment_bits(new)


def parameter_names(tensors: dict[str, Stored]) -> list[str]:
    """In the order of the file, which numbers follow."""
    return [p.name for p in parameters(tensors, {}) if "bow_extractor" not in p.name]


def bits(tensors: dict[str, Stored]) -> dict[str, tuple]:
    return {name: (t.dtype, t.shape, t.bits().tobytes()) for name, t in tensors.items()}


def moment_bits(optimizer: dict) -> dict:
    """Without the number of updates, which older files hold as an integer."""
    return {
        key: bits({kind: m for kind, m in value.items() if kind != "step"})
        for key, value in optimizer["state"].items()
    }


def module_of(torch: ModuleType, tensors: dict) -> Any:
    """A PyTorch module whose parameters have the names and values of a state dict."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        if leaf in STATISTICS or "queue" in name or "bow_extractor" in name:
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, torch.nn.Parameter(tensor.clone()))
    return root


def torch_optimizer(torch: ModuleType, file: str, model: Any) -> Any:
    """The optimizer that the system builds."""
    if "moco_v2" in file:
        return torch.optim.SGD(model.parameters(), 1.0, momentum=0.5)
    if "moca" not in file:
        return torch.optim.AdamW(model.parameters(), 1.0)
    groups: list[list[Any]] = [[], [], [], []]
    for name, p in model.named_parameters():
        if "teacher" not in name and "pos_embed" not in name and not name.endswith(".scale"):
            plain = p.ndim == 1 or name.endswith(".bias")
            groups[2 * ("_pred.layers_w." in name) + (not plain)].append(p)
    return torch.optim.AdamW([{"params": group} for group in groups], 1.0)


@pytest.mark.parametrize("file", [name for name in MOMENTS if "resnet" not in name])
def test_pytorch_goes_on_from_what_is_written(file: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    spec = formats.read_spec(FILES / file, [*OVERRIDES[file], "optim.clip_norm=null"])
    found = source(file)
    state = formats.load_training_state(FILES / file, spec, print)
    written(found.format, state, spec, tmp_path / "w.pth")
    tree = torch.load(tmp_path / "w.pth", weights_only=True)
    model = module_of(torch, tree.get("model") or tree["state_dict"])
    optimizer = torch_optimizer(torch, file, model)
    optimizer.load_state_dict(tree["optimizer"])
    params = dict(model.named_parameters())
    rng = np.random.default_rng(0)
    gradients = {}
    for ours, names in found.renamed.origin.items():
        name = next((n for n in (names[0], f"module.{names[0]}") if n in params), "")
        if f"optimizer.{kinds(found).popitem()[1]}.{ours}" in state:
            gradients[ours] = rng.standard_normal(state[ours].shape).astype(np.float32)
            params[name].grad = torch.from_numpy(gradients[ours])
    optimizer.step()
    expected = stepped(state, gradients, spec)
    for ours in gradients:
        theirs = found.renamed.origin[ours][0]
        own = params.get(theirs, params.get(f"module.{theirs}")).detach().numpy()
        assert_close(own, expected[ours], 1e-6, ours)


def stepped(state: State, gradients: State, spec: RunSpec) -> State:
    """The parameters after an update by the rule of core.reference."""
    members = groups.assign(gradients, spec)
    hyper = Hyper(0, spec.optim.lr, spec.optim.weight_decay, 0.99)
    values = {name: state[name].astype(np.float64) for name in gradients}
    for name, value in values.items():
        lr, decay = groups.rates(members[name], spec.optim, hyper)
        own = [state[f"optimizer.{kind}.{name}"].astype(np.float64)
               for kind in KINDS[spec.optim.name]]  # fmt: skip
        gradient = gradients[name].astype(np.float64)
        if isinstance(spec.optim, AdamWSpec):
            adamw(value, gradient, *own, count=int(state[moments.STEP]) + 1, lr=lr,
                  betas=spec.optim.betas, eps=spec.optim.eps, weight_decay=decay)  # fmt: skip
        else:
            sgd(value, gradient, *own, lr=lr, momentum=spec.optim.momentum, weight_decay=decay)
    return values


def test_a_format_without_the_optimizer_refuses_it(tmp_path: Path) -> None:
    spec = formats.read_spec(FILES / V3, [*OVERRIDES[V3], "optim={name: sgd}"])
    state = formats.load_weights(FILES / V3, spec)
    buffers = {f"optimizer.momentum_buffer.{n}": a for n, a in state.items()}
    with pytest.raises(UserError, match=r"optim.name: sgd: files of this format hold the state of"):
        written(FORMATS["moco_v3"], {**state, **buffers}, spec, tmp_path / "w.pth")
