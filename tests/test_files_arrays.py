"""Files that anybody may have made: read right, or refused in one line, and never executed."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from triptych.core.errors import UserError
from triptych.core.formats import read_arrays

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "count": np.array(7, np.int64),
    "b": np.linspace(0, 1, 5),
    "flags": np.array([True, False]),
    "none": np.zeros((0, 4), np.float16),
}

fuzzed = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def npz(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "."), content)
    return stream.getvalue()


def npy_header(text: str, version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode()


def header(shape: str, descr: str = "<f8") -> bytes:
    return npy_header(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n")


def tensors(layout: object, data: bytes = b"") -> bytes:
    text = layout if isinstance(layout, bytes) else json.dumps(layout).encode()
    return struct.pack("<Q", len(text)) + text + data


class Bomb:
    """Unpickling it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


def refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_arrays(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes())
        for n in a
    )


# --------------------------------------------------------------------------------- good files


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "bin", "pth"])
def test_a_file_is_known_by_its_content(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    for savez in (np.savez, np.savez_compressed):
        with open(path, "wb") as stream:
            savez(stream, **ARRAYS)
        assert same(read_arrays(path), ARRAYS)
    save_file(ARRAYS, path)
    assert same(read_arrays(path), ARRAYS)


def test_memory_order_and_byte_order_are_understood(tmp_path: Path) -> None:
    value = np.arange(6.0).reshape(2, 3)
    np.savez(tmp_path / "x.npz", fortran=np.asfortranarray(value), big=value.astype(">f8"))
    loaded = read_arrays(tmp_path / "x.npz")
    assert np.array_equal(loaded["fortran"], value)
    assert same({"big": loaded["big"]}, {"big": value})


def test_bfloat16_is_widened_exactly(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.3895314e38, 1e-40], np.float32)
    values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    halves = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    layout = {
        "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "n": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]},
    }
    (tmp_path / "x").write_bytes(tensors(layout, halves + struct.pack("<q", 5)))
    loaded = read_arrays(tmp_path / "x")
    assert same(loaded, {"b": values.reshape(2, 2), "n": np.array(5)})


# ------------------------------------------------------------------------------ hostile files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither npz nor safetensors, but an empty file"),
        (b"hello, world", "neither npz nor safetensors, but it begins with b'hello, wo'"),
        (pickle.dumps({"a": 1}), "a pickle, which could run code and is never loaded"),
        (npy(np.zeros(3)), "a single NumPy array without a name"),
        (b"PK\x03\x04" + b"x" * 99, "damaged: File is not a zip file"),
        (npz(a__npy=npy(np.zeros(9)))[:-30], "damaged: File is not a zip file"),
        (npz(archive__data__pkl=b"\x80\x02}."), "holds 'archive.data.pkl', which is no array"),
        (npz(a__npy=b"nothing"), "damaged: "),
        (npz(a__npy=npy(np.array(["x"]))), "'a.npy' holds <U1, expected numbers"),
        (npz(a__npy=npy(np.zeros(2, "f4,f4"))), "'a.npy' holds .*, expected numbers"),
        (npz(a__npy=npy(np.zeros(2, "M8[s]"))), "'a.npy' holds .*, expected numbers"),
        (npz(a__npy=header("(9,)") + b"x" * 64), r"damaged: \d+ bytes .* float64 of shape \(9,\)"),
        (npz(a__npy=header("(1 << 60,)")), "damaged: "),
        (npz(a__npy=header(f"({1 << 60},)")), "damaged: .* cannot hold float64"),
        (npz(a__npy=header("(-2, -3)") + b"x" * 48), "damaged: "),
        (npz(a__npy=header("(" * 200)), "damaged: "),
        (npz(a__npy=header("(3,)", "|O8") + b"x" * 24), "pickled Python objects"),
        (npz(a__npy=header("(3,)", "__import__('os')")), "damaged: "),
        (npz(a__npy=npy_header("{'descr': '<f8'", b"\x03\x00")), r"damaged: npy version \(3, 0\)"),
        (npz(a__npy=npy_header("{'descr': '<f8'", b"\x07\x00")), "damaged: "),
        (tensors(b"{" + b"x" * 20), "damaged: .*[Hh]eader"),
        (tensors({})[:-1] + b"{", "damaged: "),
        (b"\xff" * 7 + b"\x7f{", "damaged: "),
        (b"\0" * 8 + b"{}", "damaged: "),
        (save(ARRAYS)[:-1], "damaged: "),
        (save(ARRAYS) + b"x", "damaged: "),
        (
            tensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"x" * 4),
            "damaged: ",
        ),
        (
            tensors(
                {"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 4]}}, b"xxxx"
            ),
            "damaged: ",
        ),
        (
            tensors({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, b"xxxx"),
            "'a' holds F8_E4M3, which is not supported",
        ),
        (
            tensors({"a": {"dtype": "I3", "shape": [4], "data_offsets": [0, 4]}}, b"xxxx"),
            "damaged: ",
        ),
    ],
)
def test_a_hostile_file_is_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    refused(tmp_path / "x", content, message)


def test_pickled_objects_are_refused_by_name_and_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    objects = np.array([Bomb(trace)], object)
    content = npz(fine__npy=npy(np.zeros(3)), evil__npy=npy(objects))
    refused(tmp_path / "x.npz", content, "'evil.npy' holds pickled Python objects")
    refused(tmp_path / "x.npz", pickle.dumps(Bomb(trace)), "a pickle, which could run code")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists(), "the bomb is a dud"


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x", "w") as archive, pytest.warns(UserWarning, match="Dupli"):
        for value in (1.0, 2.0):
            archive.writestr("a.npy", npy(np.full(3, value)))
    refused(tmp_path / "x", (tmp_path / "x").read_bytes(), "it holds 'a.npy', twice")


def test_a_size_that_no_packing_reaches_is_refused_before_it_is_believed(tmp_path: Path) -> None:
    """A forged archive whose directory and header agree on a petabyte."""
    count = 1 << 47
    member = header(f"({count},)")
    content = bytearray(npz(a__npy=member))
    directory = content.rindex(b"PK\x01\x02")
    # A 64-bit size: the 32-bit field is saturated and an extra field holds the number.
    content[directory + 24 : directory + 28] = b"\xff" * 4
    name, extra = struct.unpack_from("<HH", content, directory + 28)
    assert extra == 0
    field = struct.pack("<HHQ", 1, 8, len(member) + 8 * count)
    struct.pack_into("<H", content, directory + 30, len(field))
    content[directory + 46 + name : directory + 46 + name] = field
    size = struct.unpack_from("<I", content, content.rindex(b"PK\x05\x06") + 12)[0]
    struct.pack_into("<I", content, content.rindex(b"PK\x05\x06") + 12, size + len(field))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.infolist()[0].file_size == len(member) + 8 * count
    refused(tmp_path / "x", bytes(content), r"'a.npy' is damaged: \d{16} bytes \(packed: \d+\)")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_arrays(tmp_path / "none.npz")
    with pytest.raises(UserError, match="not a file"):
        read_arrays(Path("/dev/null"))


# --------------------------------------------------------------------------------------- chance


def never_crashes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        read_arrays(path)
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith(f"{path}: ")


@fuzzed
@given(content=st.binary(max_size=200))
def test_random_bytes(tmp_path: Path, content: bytes) -> None:
    never_crashes(tmp_path / "x", content)
    never_crashes(tmp_path / "x", b"PK\x03\x04" + content)
    never_crashes(tmp_path / "x", tensors(content))
    never_crashes(tmp_path / "x", tensors(b"{" + content))


@fuzzed
@given(text=st.text(max_size=60), version=st.sampled_from([b"\x01\x00", b"\x02\x00", b"\x03\x00"]))
@example(text="{" * 500, version=b"\x01\x00")
@example(text="{'descr': {}, 'fortran_order': [], 'shape': ''}", version=b"\x01\x00")
@example(text="{[]: 1}", version=b"\x01\x00")
def test_random_npy_headers(tmp_path: Path, text: str, version: bytes) -> None:
    raw = text.encode("latin-1", "replace")
    size = struct.pack("<H" if version[0] == 1 else "<I", len(raw))
    never_crashes(tmp_path / "x", npz(a__npy=b"\x93NUMPY" + version + size + raw))


LITERAL = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=4,
)


@fuzzed
@given(descr=LITERAL, order=LITERAL, shape=LITERAL)
def test_npy_headers_of_the_wrong_types(
    tmp_path: Path, descr: object, order: object, shape: object
) -> None:
    text = ascii({"descr": descr, "fortran_order": order, "shape": shape})
    never_crashes(tmp_path / "x", npz(a__npy=npy_header(text)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "F6_E2M3", "C64", "I64", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(0, 1 << 63), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)) | JSON,
    }
)


@fuzzed
@given(layout=st.dictionaries(st.text(max_size=4), ENTRY | JSON, max_size=2), data=st.binary())
def test_random_safetensors_headers(tmp_path: Path, layout: object, data: bytes) -> None:
    never_crashes(tmp_path / "x", tensors(layout, data))


@fuzzed
@given(data=st.data(), compressed=st.booleans())
def test_files_with_a_few_bytes_changed(
    tmp_path: Path, data: st.DataObject, compressed: bool
) -> None:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **ARRAYS)
    for content in (bytearray(stream.getvalue()), bytearray(save(ARRAYS))):
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        never_crashes(tmp_path / "x", bytes(content))
