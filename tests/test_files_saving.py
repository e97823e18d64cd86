"""Each system's own loader opens what is written for it, bit for bit; nothing is half written."""

import json
import os
import subprocess
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import forged

from triptych import backends
from triptych.core.errors import UserError
from triptych.core.files import zips
from triptych.core.files.reading import read
from triptych.core.files.saving import write
from triptych.core.files.tree import Malformed, Stored, tensors

BITS = np.arange(0x3F80, 0x3F86, dtype=np.uint16).reshape(2, 3)
"""Bit patterns of six bfloat16 numbers, from 1 on."""


def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    floats = generator.standard_normal((3, 4, 2))
    return {
        "conv.weight": floats.astype(np.float32).transpose(2, 0, 1),
        "double": floats,
        "half": floats.astype(np.float16),
        "count": np.array(1234567890123, np.int64),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 3), np.float32),
        "bytes": np.arange(5, dtype=np.uint8),
    }


def stored(*, named: bool = False) -> dict[str, Any]:
    return {
        name: Stored.of(values, unique=f"linear_{place}.w_0" if named else "")
        for place, (name, values) in enumerate(arrays().items())
    }


def training(*, named: bool = False) -> dict[str, Any]:
    """A training state: what stands beside the tensors, and one tensor that is there twice."""
    weights = stored(named=named)
    moments = {0: {"step": 3, "exp_avg": Stored.of(np.ones(3, np.float32))}}
    group = {"lr": 0.1, "betas": (0.9, 0.999), "params": [0], "foreach": None, "amsgrad": False}
    return {
        "epoch": 3,
        "arch": "vit é",
        "seed": -(2**70),
        "raw": b"\x00\xff",
        "model": weights,
        "tied": weights["double"],
        "optimizer": {"state": moments, "param_groups": [group]},
    }


def plain(node: Any) -> Any:
    """The tree with tensors as (type, shape, bytes)."""
    if isinstance(node, Stored):
        return node.dtype, node.shape, node.bits().tobytes()
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    return type(node)(map(plain, node)) if isinstance(node, list | tuple) else node


@pytest.mark.parametrize("container", ["torch", "paddle", "oneflow"])
@pytest.mark.parametrize("named", [False, True])
def test_a_training_state_comes_back(tmp_path, container, named):
    tree = training(named=named)
    if container == "paddle":
        del tree["raw"]
    write(tmp_path / "x", tree, container)
    back = read(tmp_path / "x")
    assert plain(back.tree) == plain(tree) and back.container.startswith(container)
    if named and container == "paddle":
        assert back.tree["model"]["double"].unique == "linear_1.w_0"


@pytest.mark.parametrize("container", ["torch", "paddle", "safetensors", "npz", "oneflow"])
def test_flat_tensors_come_back(tmp_path, container):
    tree = stored(named=True)
    write(tmp_path / "x", tree, container)
    back = read(tmp_path / "x").tree
    assert plain(back) == plain(tree)
    if container == "paddle":
        assert {n: s.unique for n, s in back.items()} == {n: s.unique for n, s in tree.items()}


@pytest.mark.parametrize("container", ["torch", "paddle", "safetensors"])
def test_bfloat16_keeps_its_bits(tmp_path, container):
    write(tmp_path / "x", {"a": Stored.of(BITS, "bfloat16")}, container)
    back = read(tmp_path / "x").tree["a"]
    assert back.dtype == "bfloat16" and np.array_equal(back.bits(), BITS)


def test_npz_widens_bfloat16_and_oneflow_refuses_it(tmp_path):
    tree = {"a": Stored.of(BITS, "bfloat16")}
    write(tmp_path / "x.npz", tree, "npz")
    assert np.load(tmp_path / "x.npz")["a"][0, 0] == 1
    with pytest.raises(UserError, match=r"x: cannot be written: OneFlow loads no .* bfloat16"):
        write(tmp_path / "x", tree, "oneflow")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_the_values_of_pytorch_are_aligned_and_shared(tmp_path):
    write(tmp_path / "x", training(), "torch")
    content = (tmp_path / "x").read_bytes()
    tree = training()
    found = {id(s): s for _, s in tensors(tree) if s.nbytes > 16}
    for values in found.values():
        raw = values.bits().tobytes()
        assert content.count(raw) == 1 and content.index(raw) % 64 == 0


def loaded(backend: str, path: Path) -> Any:
    """What a framework's own loader gives, with tensors as NumPy arrays."""
    if backend == "torch":
        import torch

        return torch.load(path, weights_only=True)
    if backend == "paddle":
        import paddle

        return paddle.load(str(path))
    import oneflow

    return oneflow.load(str(path))


def test_the_own_loader_opens_it(backend, backend_name, tmp_path):
    tree = training()
    # OneFlow cannot make an empty tensor from an array, and paddle.load refuses bytes.
    del tree["model"]["none"]
    raw = tree.pop("raw") if backend_name == "paddle" else None
    write(tmp_path / "x", tree, backend_name)
    back = loaded(backend_name, tmp_path / "x")
    assert (back["epoch"], back["arch"], back["seed"]) == (3, "vit é", -(2**70))
    assert raw or back["raw"] == b"\x00\xff"
    assert back["optimizer"]["param_groups"] == tree["optimizer"]["param_groups"]
    for name, values in tree["model"].items():
        array = back["model"][name].numpy()
        assert array.dtype == values.dtype and np.array_equal(array, values.bits()), name
    assert back["optimizer"]["state"][0]["exp_avg"].numpy().tolist() == [1, 1, 1]


def test_the_own_loader_opens_flat_states_and_bfloat16(backend, backend_name, tmp_path):
    tree = stored(named=True)
    del tree["none"]
    if backend_name != "oneflow":
        tree["wide"] = Stored.of(BITS, "bfloat16")
    write(tmp_path / "x", tree, backend_name)
    back = loaded(backend_name, tmp_path / "x")
    assert list(back) == list(tree)
    for name in arrays().keys() & tree.keys():
        assert np.array_equal(back[name].numpy(), tree[name].bits()), name
    if backend_name != "oneflow":
        assert "bfloat16" in str(back["wide"].dtype)
    if backend_name == "paddle":
        assert back["double"].name == "linear_1.w_0"


def test_safetensors_own_library_opens_it(tmp_path):
    write(tmp_path / "x", stored(), "safetensors")
    back = load_file(tmp_path / "x")
    assert all(np.array_equal(back[name], values) for name, values in arrays().items())
    start = int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")
    assert start % 8 == 0 and json.loads((tmp_path / "x").read_bytes()[8 : 8 + start])


@pytest.mark.parametrize("container", ["torch", "paddle", "oneflow", "safetensors", "npz"])
def test_a_failure_leaves_the_earlier_file(tmp_path, container):
    def fail() -> np.ndarray:
        raise OSError(28, "No space left on device")

    write(tmp_path / "x", stored(), container)
    late = {"a": stored()["double"], "b": Stored("float32", (2,), fail)}
    with pytest.raises(UserError, match=r"x: cannot write: No space left.*free some space"):
        write(tmp_path / "x", late, container)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert plain(read(tmp_path / "x").tree) == plain(stored())


def test_a_folder_replaces_the_earlier_one_as_a_whole(tmp_path):
    write(tmp_path / "x", stored(), "oneflow")
    write(tmp_path / "x", {"a": Stored.of(np.ones(2, np.float32))}, "oneflow")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["pickled_data", "tensor_0"]
    for container in ("npz", "oneflow"):
        write(tmp_path / "x", stored(), container)
        assert read(tmp_path / "x").container == container
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_process_left_is_removed_or_put_back(tmp_path):
    dead, alive = subprocess.Popen(["true"]), os.getppid()
    dead.wait()
    for name in (f".x.{dead.pid}", f".x.{alive}", f".x.{os.getpid()}", f".xy.{dead.pid}"):
        (tmp_path / name).mkdir()
    write(tmp_path / f".x.{dead.pid}.earlier", stored(), "oneflow")
    late = {"a": Stored("float32", (2,), lambda: np.zeros(2)), "b": 1 + 2j}
    with pytest.raises(UserError):
        write(tmp_path / "x", late, "oneflow")
    # The process was killed after the earlier folder had left and before the new one came.
    assert plain(read(tmp_path / "x").tree) == plain(stored())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"x", f".x.{alive}", f".xy.{dead.pid}"}
    (tmp_path / f".x.{dead.pid}.earlier").mkdir()
    write(tmp_path / "x", stored(), "npz")
    assert read(tmp_path / "x").container == "npz"
    assert {path.name for path in tmp_path.iterdir()} == names


def test_an_interruption_between_two_renamings_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "x", stored(), "oneflow")
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        if target == tmp_path / "x" and not str(source).endswith("earlier"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", {"a": Stored.of(np.ones(2, np.float32))}, "oneflow")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert plain(read(tmp_path / "x").tree) == plain(stored())


@pytest.mark.parametrize(
    ("tree", "container", "reason"),
    [
        ({"a": {"b": 1 + 2j}}, "torch", "a|b: an object of type complex cannot be written"),
        ({"a": Stored.of(np.zeros(2, np.uint32))}, "paddle", "type uint32"),
        ({"a": Stored.of(np.zeros(2, np.uint32))}, "torch", "type uint32"),
        ({"a": [b"x"]}, "paddle", "a|0: an object of type bytes cannot be written"),
        ({"epoch": 3}, "safetensors", "holds only named tensors, not epoch"),
        ([1], "npz", "holds only named tensors, not this tree"),
    ],
)
def test_what_a_container_cannot_hold_is_named(tmp_path, tree, container, reason):
    with pytest.raises(UserError) as error:
        write(tmp_path / "x", tree, container)
    assert f"{tmp_path / 'x'}: cannot be written: " in str(error.value)
    assert reason in str(error.value) and not list(tmp_path.iterdir())


def test_every_backend_has_its_container():
    from triptych.core.files.saving import WRITERS

    assert set(backends.BACKENDS) <= set(WRITERS)


def test_the_memory_of_mapped_files_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    values = np.arange(2**18, dtype=np.float32)
    write(path, {"x": Stored.of(values)}, "torch")
    stored = read(path).tree["x"]
    assert stored.bits().sum() and mapped_kib(path) > 900
    zips.release()
    assert mapped_kib(path) == 0
    assert np.array_equal(stored.bits(), values)


def mapped_kib(path: Path) -> int:
    """How much of a file is in the memory of this process, KiB."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [i for i, line in enumerate(lines) if line.endswith(str(path))]
    rows = [next(x for x in lines[i:] if x.startswith("Rss:")) for i in starts]
    return sum(int(row.split()[1]) for row in rows)


def test_checksums_that_the_file_states_go_on_with_their_bytes(tmp_path: Path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(tmp_path / "a.pth", {"w": Stored.of(values)}, "torch")
    found = read(tmp_path / "a.pth").tree["w"]
    assert found.checksum == zlib.crc32(values.tobytes())
    turned = found.changed((3, 2), np.transpose)
    write(tmp_path / "b.pth", {"w": found, "t": turned}, "torch")
    with zipfile.ZipFile(tmp_path / "b.pth") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize(
    ("count", "offset", "shape", "strides", "whole"),
    [
        (6, 0, (2, 3), (3, 1), True),
        (7, 0, (2, 3), (3, 1), False),
        (7, 1, (2, 3), (3, 1), False),
        (6, 0, (3, 2), (1, 3), False),
        (6, 0, (5,), (1,), False),
    ],
)
def test_only_all_of_a_storage_has_its_checksum(tmp_path, count, offset, shape, strides, whole):
    tensor = forged.tensor(
        forged.numbers(*shape),
        forged.numbers(*strides),
        forged.number(offset),
        forged.storage(count=count),
    )
    content = forged.torch_zip(forged.state(tensor), {"0": bytes(4 * count)})
    (tmp_path / "x.pth").write_bytes(content)
    assert (read(tmp_path / "x.pth").tree["weight"].checksum is not None) == whole


def test_a_damaged_tensor_stays_damaged(tmp_path: Path):
    write(tmp_path / "a.pth", {"w": Stored.of(np.ones(8, np.float32))}, "torch")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[content.index(np.ones(8, np.float32).tobytes())] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    write(tmp_path / "b.pth", read(tmp_path / "a.pth").tree, "torch")
    with pytest.raises(Malformed, match="its checksum differs"):
        read(tmp_path / "b.pth").tree["w"].verify()
