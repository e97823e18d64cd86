"""Weights out of the containers in which other systems save them."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from support import forged
from support.golden_replay import format_of, spec_file
from support.golden_weights import official_state

from triptych.core import config, formats
from triptych.core.config.spec import InitSpec, RunSpec
from triptych.core.contracts import State
from triptych.core.errors import UserError
from triptych.core.files.saving import write
from triptych.core.files.tree import Stored

FILES = Path(__file__).parent / "golden" / "formats"
HASHES = json.loads((FILES / "hashes.json").read_text())
OFFICIAL = "moco_v2_resnet18_torch1.9.pth.tar"
SUPERVISED = "torchvision_resnet18_half_legacy.pth"
RESNET = {"name": "resnet18", "width": 2, "image_size": 64}
V2 = {"name": "moco_v2", "output_dim": 24, "queue_size": 48}
LINEAR = {"name": "linear", "classes": 10}


def spec_of(method: dict[str, object], **model: object) -> RunSpec:
    train = {"steps": 10, "batch_size": 8}
    return RunSpec.model_validate({"model": model or RESNET, "method": method, "train": train})


def digest(array: np.ndarray, dtype: str, shape: list[int]) -> str:
    """Of the values as the file has them."""
    return hashlib.sha256(array.astype(dtype).reshape(shape).tobytes()).hexdigest()


def wrong(arrays: State, file: str, prefix: str) -> list[str]:
    """The arrays that are not equal to the tensors of the file, by name."""
    found = []
    for name, array in arrays.items():
        dtype, shape, sha256 = HASHES[file]["tensors"][prefix + name]
        if digest(array, dtype, shape) != sha256:
            found.append(name)
    return found


def encoder_of(path: Path, spec: RunSpec, **init: object) -> State:
    """The encoder by canonical name without a prefix."""
    state = formats.load_encoder(path, spec, InitSpec.model_validate(init))
    return {name.removeprefix("student.encoder."): array for name, array in state.items()}


def stored(arrays: State, prefix: str = "") -> dict[str, Stored]:
    return {prefix + name: Stored.of(array) for name, array in arrays.items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and np.array_equal(a[n], b[n]) for n in a
    )


def refusal(path: Path, spec: RunSpec) -> str:
    """The one line of the error, without the file's name."""
    with pytest.raises(UserError) as caught:
        formats.load_encoder(path, spec, InitSpec())
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------ what is loaded


def test_an_official_checkpoint_gives_every_tensor() -> None:
    spec = spec_of(V2)
    state = formats.load_weights(FILES / OFFICIAL, spec)
    official = formats.FORMATS["moco"].from_canonical(state, spec)
    assert len(official) == len(HASHES[OFFICIAL]["tensors"])
    assert wrong(official, OFFICIAL, "state_dict|module.") == []
    assert all(array.flags.writeable and array.flags.c_contiguous for array in state.values())


def test_an_official_checkpoint_gives_each_encoder() -> None:
    student, teacher = (
        encoder_of(FILES / OFFICIAL, spec_of(LINEAR), branch=b) for b in ("student", "teacher")
    )
    assert len(student) == len(teacher) == 120
    assert wrong(student, OFFICIAL, "state_dict|module.encoder_q.") == []
    assert wrong(teacher, OFFICIAL, "state_dict|module.encoder_k.") == []
    assert wrong(student, OFFICIAL, "state_dict|module.encoder_k.")


@pytest.mark.parametrize(
    ("case", "container", "key", "prefix"),
    [
        ("moco_v3_vit_tiny", "torch", "state_dict", "module."),
        ("moca_vit_tiny", "torch", "model", ""),
        ("moca_vit_tiny", "paddle", "target_encoder", ""),
        ("moca_vit_tiny", "oneflow", "module", "module."),
        ("moca_vit_tiny", "torch", None, ""),
    ],
)
def test_the_state_dict_is_found_in_any_container(
    tmp_path: Path, case: str, container: str, key: str | None, prefix: str
) -> None:
    spec, official = config.load(spec_file(case)), official_state(case)
    weights = stored(official, prefix)
    moments = stored({"0": np.zeros(3)})
    beside = {"epoch": 3, "best_acc1": Stored.of(np.array(0.5)), "optimizer": {"state": moments}}
    tree = {**beside, **({key: weights} if key else weights)}
    if not key:
        tree.pop("best_acc1")
    write(tmp_path / "w", tree, container)
    loaded = formats.load_weights(tmp_path / "w", spec)
    assert same(loaded, format_of(spec).to_canonical(official, spec))


def test_half_and_bfloat16_are_widened_exactly(tmp_path: Path) -> None:
    arrays = encoder_of(FILES / SUPERVISED, spec_of(LINEAR), allow_unused=["fc."])
    assert len(arrays) == 120 and wrong(arrays, SUPERVISED, "") == []
    assert {a.dtype.name for a in arrays.values()} == {"float32", "int64"}

    bits = {
        n: (a.view(np.uint32) >> 16).astype(np.uint16)
        for n, a in arrays.items()
        if a.dtype.kind == "f"
    }
    narrow = {n: Stored.of(b, "bfloat16") for n, b in bits.items()}
    write(tmp_path / "w", {**stored(arrays), **narrow}, "torch")
    loaded = encoder_of(tmp_path / "w", spec_of(LINEAR))
    for name, pattern in bits.items():
        assert loaded[name].dtype == np.float32
        assert np.array_equal(loaded[name].view(np.uint32), pattern.astype(np.uint32) << 16)


# ----------------------------------------------------------------------------- what is refused


def test_a_supervised_network_is_no_pretrained_encoder() -> None:
    assert refusal(FILES / SUPERVISED, spec_of(LINEAR)).startswith("a classifier of 10 classes (fc")


def test_transposed_matrices_are_refused_by_name(tmp_path: Path) -> None:
    official = official_state("moca_vit_tiny")
    turned = {
        n: a.T if n.endswith(("qkv.weight", "fc1.weight")) else a for n, a in official.items()
    }
    write(tmp_path / "w", stored(turned), "torch")
    line = refusal(tmp_path / "w", spec_of(LINEAR))
    assert "blocks.0.attn.qkv.weight (96, 288): matrices are (in, out)" in line


def test_which_state_dict_is_meant_must_be_clear(tmp_path: Path) -> None:
    spec, path = spec_of(LINEAR), tmp_path / "w"
    weights = stored({"conv1.weight": np.zeros((2, 3, 7, 7))})
    several = "torch zip: plain and averaged weights, 'model', 'model_ema'; say which: init.average"
    write(path, {"model": weights, "model_ema": weights, "epoch": 1}, "torch")
    assert refusal(path, spec).startswith(several)
    write(path, {"model": weights, **weights}, "torch")
    assert "model) and torchvision (a ResNet encoder, the top level) equally" in refusal(path, spec)


@pytest.mark.parametrize(
    ("tree", "seen"),
    [
        ({"epoch": 1, "optimizer": {"state": stored({"0.a": np.zeros(3)})}}, "epoch, optimizer"),
        ({"model": {"epoch": 1}}, "model"),
        ({"state_dict": {"deeper": stored({"a.b": np.zeros(3)})}}, "state_dict"),
        ([1, 2], "a list"),
        (Stored.of(np.zeros(3)), "one tensor"),
        ({}, "nothing"),
        ({str(n): n for n in range(10)}, "0, 1, 2, 3, 4, 5, 6, 7, and 2 more"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(
    tmp_path: Path, tree: object, seen: str
) -> None:
    write(tmp_path / "w", tree, "torch")
    line = refusal(tmp_path / "w", spec_of(LINEAR))
    optimizer = "an optimizer's state (optimizer) and no weights; " * ("optimizer" in seen)
    assert line.startswith(f"torch zip: {optimizer}no state dict under state_dict, model, ")
    assert line.endswith(f"it holds {seen}; save the model's state dict alone")


def test_other_kinds_of_files_are_one_line(tmp_path: Path) -> None:
    for name in ("w.pth", "w.npz"):
        (tmp_path / name).write_bytes(b"hello, world")
        assert "which is no known kind; expected" in refusal(tmp_path / name, spec_of(LINEAR))


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "w.pth"
    gadget = pickle.dumps({"state_dict": {}, "args": Bomb(trace)}, protocol=2)
    for content in (gadget, forged.torch_zip(gadget, {})):
        path.write_bytes(content)
        assert "touch" in refusal(path, spec_of(LINEAR)) or "pathlib" in refusal(
            path, spec_of(LINEAR)
        )
    assert not trace.exists()
    pickle.loads(gadget)
    assert trace.exists(), "the bomb is a dud"
