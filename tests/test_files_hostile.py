"""A hostile file of weights runs nothing, and what it states is checked."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.support import forged
from tests.support.forged import call, complaint, name, number, numbers, state, tensor, text
from triptych.core.data.cifar_pickles import unpickled
from triptych.core.files.reading import read
from triptych.core.files.tree import Malformed

FLOATS = forged.VALUES.tobytes()

# ----------------------------------------------------------------------------------- what would run

HISTORY = name("mmengine.logging.history_buffer", "HistoryBuffer")
GADGETS = {
    "os.system": call("os", "system", text("mkdir trap")),
    "posix.mkdir": call("posix", "mkdir", text("trap")),
    "nt.system": call("nt", "system", text("mkdir trap")),
    "builtins.eval": call("builtins", "eval", text("__import__('os').mkdir('trap')")),
    "builtins.exec": call("builtins", "exec", text("import os; os.mkdir('trap')")),
    "__builtin__.eval": call("__builtin__", "eval", text("1")),
    "__builtin__.__import__": call("__builtin__", "__import__", text("os")),
    "builtins.print": call("builtins", "print", text("x")),
    "subprocess.Popen": call("subprocess", "Popen", text("mkdir trap")),
    "functools.partial": call("functools", "partial", name("builtins", "tuple")),
    "operator.attrgetter": call("operator", "attrgetter", text("system")),
    "runpy.run_path": call("runpy", "run_path", text("x")),
    "importlib.import_module": call("importlib", "import_module", text("os")),
    "pickle.loads": call("pickle", "loads", text("x")),
    "numpy.load": call("numpy", "load", text("x")),
    "numpy.core.multiarray.os": name("numpy.core.multiarray", "os"),
    "numpy.testing._private.utils.runstring": call("numpy.testing._private.utils", "runstring"),
    "torch.load": call("torch", "load", text("x")),
    "torch.hub.load": call("torch.hub", "load", text("x")),
    "torch.storage._load_from_bytes": call("torch.storage", "_load_from_bytes", text("x")),
    "torch._utils.os.system": call("torch._utils", "os.system", text("mkdir trap")),
    "collections.OrderedDict.__init__": name("collections", "OrderedDict.__init__"),
    "os.path": text("os") + text("path") + b"\x93",
    "builtins.getattr.__self__": text("builtins") + text("getattr.__self__") + b"\x93",
    "getattr(collections.OrderedDict, '__init__')": call(
        "builtins", "getattr", name("collections", "OrderedDict"), text("__init__")
    ),
    "HistoryBuffer, '__init__'": call("builtins", "getattr", HISTORY, text("__init__")),
    "HistoryBuffer, 'mean.__globals__'": call(
        "__builtin__", "getattr", HISTORY, text("mean.__globals__")
    ),
    "getattr(str, 'mean')": call("builtins", "getattr", text("x"), text("mean")),
    "getattr(builtins.getattr, 'mean')": call(
        "builtins", "getattr", name("builtins", "getattr"), text("mean")
    ),
    "call str": text("x") + b")R",
    "call builtins.object": name("builtins", "object") + b")R",
    "call OrderedDict's result": call("collections", "OrderedDict") + b")R",
    "b'\\x82'": b"\x82\x01",
    "b'\\x84'": b"\x84\x01\x00\x00\x00",
    "b'i'": b"(ios\nsystem\n",
    "b'o'": b"(" + name("collections", "OrderedDict") + b"o",
    "b'\\x92'": name("collections", "OrderedDict") + b")}\x92",
    "b'P'": b"Pstorage\n",
    "b'\\x97'": b"\x97",
}
"""What the message must name -> operations that would run code, or prepare it."""
SHOWN = {"call OrderedDict's result": "call dict"}


def containers(folder: Path, gadget: bytes) -> dict[str, Path]:
    """A file of each container that holds a gadget."""
    content = state(gadget)
    forged.oneflow_folder(folder / "oneflow", gadget, {})
    (folder / "x.pth").write_bytes(forged.torch_zip(content, {}))
    (folder / "x.legacy").write_bytes(forged.torch_legacy(content, {}))
    (folder / "x.pdparams").write_bytes(content)
    return {file: folder / file for file in ("x.pth", "x.legacy", "x.pdparams", "oneflow")}


@pytest.mark.parametrize("gadget", GADGETS)
def test_nothing_that_a_file_names_is_run(tmp_path, monkeypatch, gadget):
    monkeypatch.chdir(tmp_path)
    expected = SHOWN.get(gadget, gadget)
    for path in containers(tmp_path, GADGETS[gadget]).values():
        message = complaint(path)
        assert expected in message and "nothing was run" in message, path
    with pytest.raises(Malformed):
        unpickled(io.BytesIO(state(GADGETS[gadget])))
    assert not (tmp_path / "trap").exists()


def test_the_reader_of_cifar_knows_fewer_names():
    for allowed in (HISTORY, call("torch", "Size", numbers(1)), call("builtins", "tuple")):
        with pytest.raises(Malformed, match="refused"):
            unpickled(io.BytesIO(state(allowed)))


def test_a_whole_module_is_refused(tmp_path):
    kind = b"(" + text("module") + name("torch", "FloatStorage") + text("x") + text("y")
    path = tmp_path / "x.pth"
    path.write_bytes(forged.torch_zip(state(kind + text("z") + b"tQ"), {}))
    assert "a whole module?" in complaint(path) and "save the state_dict" in complaint(path)


# ----------------------------------------------------------------------------------- what is false

VIEW = forged.storage()
LIES = {
    "a negative stride": (tensor(strides=numbers(-3, 1)), "strides (-3, 1)"),
    "a negative offset": (tensor(offset=number(-1)), "offset -1"),
    "an offset beyond": (tensor(offset=number(1)), "does not lie in its storage of 6 values"),
    "a stride beyond": (tensor(strides=numbers(4, 1)), "does not lie in its storage"),
    "a huge stride": (tensor(strides=numbers(2**59, 1)), "does not lie in its storage"),
    "a wider stride": (tensor(strides=numbers(2**64, 1)), "strides"),
    "a shape beyond": (tensor(shape=numbers(3, 3)), "does not lie in its storage"),
    "a negative shape": (tensor(shape=numbers(-2, -3)), "shape (-2, -3)"),
    "a huge shape": (tensor(shape=numbers(2**40, 2**40), strides=numbers(0, 0)), "far larger"),
    "an expanded one": (tensor(shape=numbers(2**33), strides=numbers(0)), "far larger"),
    "a wide shape": (tensor(shape=numbers(*[1] * 33), strides=numbers(*[1] * 33)), "shape"),
    "a shape of bools": (tensor(shape=b"\x88\x88\x86"), "shape (True, True)"),
    "a shape of texts": (tensor(shape=text("a") + text("b") + b"\x86"), "shape ('a', 'b')"),
    "a list as shape": (tensor(shape=b"]"), "without shape or strides"),
    "fewer strides": (tensor(strides=numbers(1)), "strides (1,)"),
    "no storage": (tensor(where=text("0")), "a tensor of type ''"),
    "a longer storage": (tensor(where=forged.storage(count=7)), "0' has 24 bytes, expected 28"),
    "a shorter storage": (
        tensor(shape=numbers(1, 1), where=forged.storage(count=5)),
        "has 24 bytes, expected 20",
    ),
    "another type": (tensor(where=forged.storage(kind="DoubleStorage")), "expected 48"),
    "a quantised type": (tensor(where=forged.storage(kind="QInt8Storage")), "torch.QInt8Storage"),
    "a negative count": (tensor(where=forged.storage(count=-1)), "a storage without name or size"),
    "a missing storage": (tensor(where=forged.storage("1")), "'archive/data/1' is missing"),
    "a path as storage": (tensor(where=forged.storage("../version")), "is missing"),
    "one name twice": (
        tensor() + b"0" + tensor(where=forged.storage(count=5)),
        "two storages with the name '0'",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_tensor_of_pytorch_that_lies_is_refused(tmp_path, lie):
    entry, reason = LIES[lie]
    path = tmp_path / "x.pth"
    path.write_bytes(forged.torch_zip(state(entry), {"0": FLOATS}))
    assert reason in complaint(path)


def test_a_legacy_file_that_lies_is_refused(tmp_path):
    path = tmp_path / "x.pth"
    honest = forged.torch_legacy(state(tensor()), {"0": FLOATS})
    for content, reason in (
        (honest[: -len(FLOATS) - 8] + struct.pack("<q", 7) + FLOATS, "has 7 values, not 6"),
        (honest[: -len(FLOATS) - 8] + struct.pack("<q", -6) + FLOATS, "has -6 values"),
        (honest[:-1], "cut short inside its tensors"),
        (forged.torch_legacy(state(tensor()), {"1": FLOATS}), "list of storages is damaged"),
        (honest.replace(b"little_endian", b"little_indian"), None),
    ):
        path.write_bytes(content)
        if reason:
            assert reason in complaint(path)
        else:
            assert np.array_equal(read(path).tree["weight"].array(), forged.VALUES)


def array(dtype: bytes, shape: bytes, data: bytes) -> bytes:
    """Pushes an array of NumPy."""
    made = call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), numbers(0))
    return made + b"(" + number(1) + shape + dtype + b"\x89" + data + b"tb"


def dtype(code: str) -> bytes:
    """Pushes a type of NumPy."""
    return call("numpy", "dtype", text(code))


BYTES = b"C" + bytes([len(FLOATS)]) + FLOATS
ARRAYS = {
    "objects": (array(dtype("O8"), numbers(1), b"]"), "an array of type 'O8': refused"),
    "fields": (array(dtype("f4,f4"), numbers(3), BYTES), "an array of type 'f4,f4': refused"),
    "a list": (array(dtype("f4"), numbers(6), b"]"), "an array of objects"),
    "too many": (array(dtype("f4"), numbers(7), BYTES), "24 bytes for float32 of shape (7,)"),
    "too wide": (array(dtype("f8"), numbers(6), BYTES), "24 bytes for float64"),
    "too few": (array(dtype("f4"), numbers(5), BYTES), "24 bytes for float32"),
    "negative": (array(dtype("f4"), numbers(-6), BYTES), "the shape (-6,)"),
    "overflow": (array(dtype("f4"), numbers(2**62, 2**62, 4), BYTES), "24 bytes"),
    "no state": (
        call("numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray")),
        "an array without values",
    ),
    "a short state": (
        call("numpy.core.multiarray", "_reconstruct") + numbers(1, 2) + b"b",
        "a damaged pickle",
    ),
}


@pytest.mark.parametrize("lie", ARRAYS)
def test_an_array_of_numpy_that_lies_is_refused(tmp_path, lie):
    entry, reason = ARRAYS[lie]
    path = tmp_path / "x.pdparams"
    path.write_bytes(state(entry))
    assert reason in complaint(path)
