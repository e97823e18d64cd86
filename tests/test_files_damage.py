"""Damaged archives, folders and files of weights are refused, wherever the damage is."""

import io
import os
import pickle
import stat
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support import forged
from tests.support.forged import CENTRAL, complaint, state, tensor, text
from tests.support.fuzz import fuzz
from triptych.core.files.reading import read
from triptych.core.files.tree import Malformed

FLOATS = forged.VALUES.tobytes()


def zipped(*members: tuple[zipfile.ZipInfo | str, bytes], packing: int = 0) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as archive:
        for info, data in members:
            archive.writestr(info, data)
    return stream.getvalue()


def link(member: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(member)
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


GOOD = ("archive/data.pkl", state(tensor()))


def edited(content: bytes, old: bytes, new: bytes, place: int) -> bytes:
    """A copy with other bytes at an offset from the last occurrence of ``old``."""
    start = content.rfind(old) + place
    return content[:start] + new + content[start + len(new) :]


HONEST = forged.torch_zip(state(tensor()), {"0": FLOATS})
END = b"PK\x05\x06"
ARCHIVES = {
    "traversal": (zipped(GOOD, ("archive/data/../../0", FLOATS)), "outside of its folder"),
    "absolute": (zipped(GOOD, ("/etc/passwd", FLOATS)), "outside of its folder"),
    "backslash": (zipped(GOOD, ("archive\\..\\x", FLOATS)), "outside of its folder"),
    "drive": (zipped(GOOD, ("C:/x", FLOATS)), "outside of its folder"),
    "symbolic link": (zipped(GOOD, (link("archive/data/0"), b"/etc/passwd")), "symbolic link"),
    "two roots": (zipped(GOOD, ("b/data.pkl", b"x")), "TorchScript"),
    "a program": (zipped(GOOD, ("archive/constants.pkl", b"x")), "TorchScript"),
    "no pickle": (zipped(("archive/x", b"x")), "no data.pkl"),
    "encrypted": (edited(HONEST, CENTRAL, b"\x01", 8), "encrypted"),
    "a method": (edited(HONEST, CENTRAL, b"\x0c", 10), "packed by method 12"),
    "a size": (edited(HONEST, CENTRAL, b"\xff\xff", 24), "false sizes"),
    "both sizes": (edited(HONEST, CENTRAL, b"\xff\xff\0\0\xff\xff\0\0", 20), "reaches beyond"),
    "a place": (edited(HONEST, CENTRAL, b"\x00\x00\x00\x00", 42), "two names"),
    "a far place": (edited(HONEST, CENTRAL, b"\xf0\xff\xff\x7f", 42), "a false place"),
    "a wide place": (edited(HONEST, CENTRAL, b"\xff\xff\xff\xff", 42), "damaged directory"),
    "a count": (edited(HONEST, END, b"\xff\x7f\xff\x7f", 8), "damaged directory"),
    "other counts": (edited(HONEST, END, b"\x07", 8), "false directory"),
    "a directory": (edited(HONEST, END, b"\x07", 16), "false directory"),
    "a comment": (HONEST + b"x", "bytes behind its end"),
    "a checksum": (HONEST.replace(b"weight", b"height", 1), "its checksum differs"),
}


@pytest.mark.parametrize("lie", ARCHIVES)
def test_an_archive_that_lies_is_refused(tmp_path, lie):
    content, reason = ARCHIVES[lie]
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert reason in complaint(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(zipped(GOOD, ("archive/data/0", FLOATS), ("archive/data/0", FLOATS)))
    assert "holds 'archive/data/0' twice" in complaint(path)


def test_overlapping_members_are_refused(tmp_path):
    """Many names for one packed member are a bomb of another kind."""
    content = zipped(("archive/data/0", FLOATS), ("archive/data/1", FLOATS), GOOD)
    first = content.index(CENTRAL)
    second = content.index(CENTRAL, first + 1)
    same = content[first + 42 : first + 46]
    overlap = content[: second + 42] + same + content[second + 46 :]
    local = overlap.replace(b"archive/data/1", b"archive/data/0", 1)
    (tmp_path / "x.pth").write_bytes(local)
    assert "two names" in complaint(tmp_path / "x.pth")


def test_packed_members_are_read(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(forged.torch_zip(state(tensor()), {"0": FLOATS}, zipfile.ZIP_DEFLATED))
    assert np.array_equal(read(path).tree["weight"].array(), forged.VALUES)


def test_links_and_paths_in_folders_are_refused(tmp_path):
    entry = b"}" + text("weight")
    for number_, folder in enumerate(("../x", "/etc", "a/b", "..", "", "x\n")):
        path = tmp_path / f"path{number_}"
        forged.oneflow_folder(path, entry + forged.oneflow_tensor(folder) + b"s", {})
        assert "which is refused" in complaint(path)
    path = tmp_path / "model"
    forged.oneflow_folder(
        path, entry + forged.oneflow_tensor("tensor_1") + b"s", {"tensor_1": forged.VALUES}
    )
    out, meta = path / "tensor_1" / "out", path / "tensor_1" / "meta"
    for text_, reason in (
        (
            "shape {\n  dim: 7\n}\ndata_type: kFloat\n",
            "24 bytes, which is no float32 of shape (7,)",
        ),
        ("shape {\n  dim: -6\n}\ndata_type: kFloat\n", "meta is damaged"),
        ("shape {\n  dim: 6\n}\ndata_type: kOFRecord\n", "of an unknown type"),
        ("shape {" + "dim: 1 " * 2000 + "}\ndata_type: kFloat\n", "meta is damaged"),
    ):
        meta.write_text(text_)
        assert reason in complaint(path)
    os.rename(out, tmp_path / "out")
    assert "tensor_1/meta" in complaint(path) or "damaged" in complaint(path)
    meta.write_text("shape {\n  dim: 6\n}\ndata_type: kFloat\n")
    assert "tensor_1/out is missing" in complaint(path)
    out.symlink_to(tmp_path / "out")
    assert "no plain file" in complaint(path)
    os.rename(path / "tensor_1", tmp_path / "tensor_1")
    (path / "tensor_1").symlink_to(tmp_path / "tensor_1")
    assert "is a symbolic link" in complaint(path)


def test_the_pointer_of_libai_stays_in_its_folder(tmp_path):
    for target in ("../x", "/etc", ".", "none", "a\nb"):
        (tmp_path / "last_checkpoint").write_text(target)
        assert "no folder here" in complaint(tmp_path)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    files = dict(forged.honest(tmp_path))
    save_file({"weight": forged.VALUES}, tmp_path / "x.safetensors")
    np.savez(tmp_path / "x.npz", weight=forged.VALUES)
    files |= {name: tmp_path / name for name in ("x.safetensors", "x.npz")}
    for path in files.values():
        content = path.read_bytes()
        assert np.array_equal(read(path).tree["weight"].array(), forged.VALUES)
        for length in range(len(content)):
            path.write_bytes(content[:length])
            complaint(path)


def test_a_flipped_bit_of_a_tensor_is_found_where_the_file_has_a_checksum(tmp_path):
    path = tmp_path / "w"
    honest = forged.torch_zip(state(tensor()), {"0": FLOATS})
    np.savez(tmp_path / "w.npz", weight=forged.VALUES)
    for content in (honest, (tmp_path / "w.npz").read_bytes()):
        path.write_bytes(content)
        read(path).tree["weight"].verify()
        place = content.index(FLOATS)
        path.write_bytes(content[:place] + b"\x01" + content[place + 1 :])
        found = read(path).tree["weight"]
        with pytest.raises(Malformed, match=r"damaged .its checksum differs"):
            found.verify()
        found.bits()


def test_a_file_of_pytorch_without_checksums_is_read(tmp_path):
    content = bytearray(forged.torch_zip(state(tensor()), {"0": FLOATS}))
    place = content.find(CENTRAL)
    while place >= 0:  # as torch.serialization.set_crc32_options(False) leaves them
        content[place + 16 : place + 20] = bytes(4)
        place = content.find(CENTRAL, place + 4)
    (tmp_path / "w.pth").write_bytes(content)
    found = read(tmp_path / "w.pth").tree["weight"]
    found.verify()
    assert np.array_equal(found.array(), forged.VALUES)


def test_a_slice_of_the_fuzzing():
    counts = fuzz(600, seed=1)
    assert 150 < counts["refused"] < 600


def test_pickles_of_python_itself_are_read(tmp_path):
    values = {"a": [1, -1, 2**40, 2**100, 1.5, None, True, False], "b": {"c": ("é", b"\x00\xff")}}
    for protocol in range(6):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps(values, protocol=protocol))
        assert read(path).tree == values, protocol
