"""Files of weights of every system are read without that system, to the last bit."""

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support import forged
from triptych.core.errors import UserError
from triptych.core.files.reading import read
from triptych.core.files.tree import Content, Record, Stored

FORMATS = Path(__file__).parent / "golden" / "formats"
HASHES = json.loads((FORMATS / "hashes.json").read_text())


def digest(tensor: Stored) -> list[object]:
    raw = np.ascontiguousarray(tensor.bits()).tobytes()
    return [tensor.dtype, list(tensor.shape), hashlib.sha256(raw).hexdigest()]


def below(content: Content, name: str) -> list[Stored]:
    """The tensors whose path ends in a name."""
    return [t for path, t in content.tensors().items() if f"|{path}".endswith(f"|{name}")]


@pytest.mark.parametrize("file", sorted(HASHES))
def test_every_tensor_of_a_file_of_each_system_has_its_hash(file):
    content = read(FORMATS / file)
    for name, expected in HASHES[file]["tensors"].items():
        assert expected in [digest(tensor) for tensor in below(content, name)], name
    for unique, name in HASHES[file].get("unique", {}).items():
        assert [t for t in below(content, name) if t.unique == unique], name


def test_the_hashes_tell_a_transposed_tensor():
    tensor = below(read(FORMATS / "torch2_numpy2.pth"), "square")[0]
    turned = tensor.changed(tensor.shape, np.transpose)
    assert digest(turned) != digest(tensor) and turned.shape == (5, 5)


@pytest.mark.parametrize("file", ["torch1.9_legacy.pth", "torch2_cuda.pth", "torch2_numpy2.pth"])
def test_what_stands_beside_the_weights_is_kept_as_plain_values(file):
    other = read(FORMATS / file).tree["other"]
    args = other["args"]
    assert isinstance(args, Record) and args.kind == "argparse.Namespace"
    assert args["lr"] == 0.03 and args["betas"] == (0.9, 0.999) and args["nested"] == {"a": 1}
    assert (args["out"], args["dt"], args["device"]) == ("runs/a", "torch.float16", "cuda:0")
    assert args["when"].kind == "datetime.datetime" and sorted(args["tags"]) == ["a", "b"]
    assert other["numpy_float64"] == 76.125 and other["numpy_bool"] is True
    assert other["big_int"] == 2**100 and other["complex"] == 1 + 2j
    assert other["bytes"] == b"\x00\xff" and other["counter"] == {"a": 2, "b": 1}
    assert list(other["numpy_strings"].bits()) and other["empty"][5] is False
    assert np.isnan(other["floats"][1])


def test_the_history_of_mmengine_is_read_and_its_methods_stay_names():
    hub = read(FORMATS / "mmpretrain_lincls_vit_epoch_1.pth").tree["message_hub"]
    history = hub["log_scalars"]["train/lr"]
    assert history.kind == "mmengine.logging.history_buffer.HistoryBuffer"
    assert history["_log_history"].array().dtype == np.float64
    assert history["statistics_methods"]["mean"] == f"{history.kind}.mean"


@pytest.mark.parametrize("file", ["paddle3_numpy2", "paddle3_protocol4"])
def test_bfloat16_of_paddle_is_widened_exactly(file):
    tensor = below(read(FORMATS / file), "flat.pdparams|bfloat16")[0]
    wide = tensor.array()
    assert (tensor.dtype, wide.dtype) == ("bfloat16", np.float32)
    assert np.array_equal(wide.view(np.uint32) >> 16, tensor.bits())


def test_a_tensor_that_paddle_split_is_joined(tmp_path):
    parts = {f"big@@.{i}": np.arange(i * 4, i * 4 + 4, dtype=np.float32) for i in range(2)}
    info = {"big": {"OriginShape": (2, 4), "slices": list(parts)}}
    names = {"big": "linear_3.w_0"}
    content = {**parts, "UnpackBigParamInfor@@": info, "StructuredToParameterName@@": names}
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps(content, protocol=2))
    tree = read(tmp_path / "x.pdparams").tree
    assert list(tree) == ["big"] and tree["big"].unique == "linear_3.w_0"
    assert np.array_equal(tree["big"].array(), np.arange(8, dtype=np.float32).reshape(2, 4))
    info["big"]["OriginShape"] = (3, 4)
    (tmp_path / "x.pdparams").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(UserError, match="'big' do not make its shape"):
        read(tmp_path / "x.pdparams")


def test_tensors_stay_in_the_file_until_they_are_asked_for(tmp_path):
    for path in forged.honest(tmp_path).values():
        tensor = read(path).tree["weight"]
        values = tensor.bits()
        assert not values.flags.owndata and not values.flags.writeable
        assert np.array_equal(values, forged.VALUES)


def test_folders_of_oneflow_and_libai(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "last_checkpoint").write_text("model_0000001")
    (run / "model_0000001").mkdir()
    for part in ("model", "optimizer"):
        entry = b"}" + forged.text("weight") + forged.oneflow_tensor("global_tensor_12") + b"s"
        where = run / "model_0000001" / part
        forged.oneflow_folder(where, entry, {"global_tensor_12": forged.VALUES})
    whole, model = read(run), read(run / "model_0000001" / "model")
    assert (whole.container, model.container) == ("libai", "oneflow")
    assert list(whole.tensors()) == ["model|weight", "optimizer|weight"]
    assert np.array_equal(model.tree["weight"].array(), forged.VALUES)


def test_safetensors_and_npz(tmp_path):
    arrays = {"a": forged.VALUES, "b": np.array(3), "c": np.zeros((0, 2), np.float16)}
    save_file(arrays, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", **arrays)
    for file, container in (("x.safetensors", "safetensors"), ("x.npz", "npz")):
        content = read(tmp_path / file)
        assert content.container == container and list(content.tree) == list(arrays)
        assert all(np.array_equal(content.tree[n].array(), a) for n, a in arrays.items())


def test_a_byte_order_of_another_machine(tmp_path):
    content = forged.torch_zip(
        forged.state(forged.tensor()), {"0": forged.VALUES.astype(">f4").tobytes()}
    )
    (tmp_path / "x.pth").write_bytes(content.replace(b"little", b"big   "))
    with pytest.raises(UserError, match="'archive/byteorder' is damaged"):
        read(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file"),
        (b"<html>not found</html>", "begins with b'<html>not', which is no known kind"),
        (b"\x93NUMPY\x01\x00", "a NumPy array without a name"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS, in whose place"),
        (b"\x1f\x8b\x08\x00", "a gzip archive, which must be unpacked first; expected"),
    ],
)
def test_other_files_are_named(tmp_path, content, reason):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / "x.pth")
    assert str(tmp_path / "x.pth") in str(error.value) and reason in str(error.value)


def test_missing_files_and_folders_without_weights(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for path, reason in ((tmp_path / "none", "no such file"), (tmp_path, "it holds notes.txt")):
        with pytest.raises(UserError, match=reason):
            read(path)


def test_reading_imports_no_framework():
    code = (
        "import sys\nfrom pathlib import Path\nfrom triptych.core.files.reading import read\n"
        f"for p in {sorted(HASHES)!r}: read(Path({str(FORMATS)!r}) / p)\n"
        "print({'torch', 'oneflow', 'paddle', 'mmengine', 'pickle'} & set(sys.modules))\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() in ("set()", "{'pickle'}")
