"""Feature files: what is written, read back and refused, in each format."""

import importlib
import json
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.feature_rows import HEADER, rows

from triptych.core.errors import UserError
from triptych.core.files import features as files
from triptych.core.files import npz
from triptych.core.files.features import Header, read_features, writing

SUFFIXES = [
    pytest.param(
        suffix,
        marks=pytest.mark.skipif(
            bool(entry.library) and importlib.util.find_spec(entry.library) is None,
            reason=f"{entry.library} is not installed",
        ),
    )
    for suffix, entry in files.FORMATS.items()
]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_written_in_parts_is_read_back_whole(suffix, tmp_path) -> None:
    path = tmp_path / f"x{suffix}"
    with writing(path, HEADER) as append:
        for start, stop in ((0, 3), (3, 4), (4, 9)):
            append(rows(start, stop))
        assert not path.exists()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    content = read_features(path)
    assert (content.classes, content.about) == (HEADER.classes, HEADER.about)
    expected = [rows(start, stop) for start, stop in ((0, 3), (3, 4), (4, 9))]
    assert list(content.features) == ["final", "layer1"]
    for name, column in content.columns.items():
        whole = np.concatenate([part[name] for part in expected])
        np.testing.assert_array_equal(column, whole, strict=name != "name")
    assert content.half(held_out=True).columns["name"].tolist() == [f"é/{n}" for n in range(5, 9)]
    assert content.half(held_out=False).half(held_out=True).columns["label"].size == 5


def test_an_archive_opens_in_numpy_alone(tmp_path) -> None:
    with writing(tmp_path / "x.npz", HEADER) as append:
        append(rows(0, 9))
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["name"][8] == "é/8" and archive["classes"].tolist() == ["ant", "bee"]
        np.testing.assert_array_equal(archive["layer1"], rows(0, 9)["layer1"])
        assert json.loads(str(archive["about"])) == {"step": 3}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_error_inside_leaves_the_earlier_file_and_nothing_else(suffix, tmp_path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_text("earlier")
    with pytest.raises(ZeroDivisionError), writing(path, HEADER) as append:
        append(rows(0, 3))
        raise ZeroDivisionError
    assert path.read_text() == "earlier"
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_one_clear_line(suffix, tmp_path) -> None:
    """A process that may write 200 kB per file stands for the disk."""
    code = (
        "import resource, signal, sys; from pathlib import Path; import numpy as np\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
        "from triptych.core.cli import exit_status\n"
        "from triptych.core.files.features import Header, writing\n"
        "def command():\n"
        "    with writing(Path(sys.argv[1]), Header((), {})) as append:\n"
        "        for _ in range(9):\n"
        "            x = np.random.default_rng(0).standard_normal((100, 100))\n"
        "            append({'label': np.zeros(100, np.int64), 'final': x})\n"
        "sys.exit(exit_status(command))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / f"x{suffix}")], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path}/x{suffix}: cannot write: "), done.stderr
    assert done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert not list(tmp_path.iterdir())


def _without(name: str, content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


def test_files_that_hold_no_features_are_named(tmp_path) -> None:
    good = {**rows(0, 9), "classes": np.array(["ant", "bee"]), "about": np.array("{}")}
    path = tmp_path / "x.npz"
    for content, said in (
        (_without("about", good), "not a feature file .* or damaged: 'about'"),
        (_without("name", good), "not a feature file: name: nothing"),
        ({**good, "label": good["label"][:3]}, "not a feature file: name: <U3 .9,."),
        ({**good, "label": good["label"] + 1}, "labels beyond its 2 classes"),
        ({**good, "final": good["final"].astype(int)}, "not a feature file: final: int64"),
        ({**good, "about": np.array("[]")}, "about: expected a JSON object"),
        ({**good, "final": np.full((9, 2), np.nan)}, "no finite features"),
    ):
        np.savez(path, **content)
        with pytest.raises(UserError, match=f"x.npz: .*{said}"):
            read_features(path)
    path.write_text("damaged")
    with pytest.raises(UserError, match="damaged"):
        read_features(path)
    with pytest.raises(UserError, match="no such file"):
        read_features(tmp_path / "y.npz")
    with pytest.raises(UserError, match=r"ends in \.npz, \.parquet, \.h5; rename it"):
        read_features(Path(__file__))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_files_of_the_same_format_are_named(suffix, tmp_path) -> None:
    """A damaged one, and a good one without what a feature file says beside its rows."""
    path = tmp_path / f"x{suffix}"
    with writing(path, HEADER) as append:
        append(rows(0, 9))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"x{suffix}: .*damaged") as caught:
        read_features(path)
    assert "\n" not in str(caught.value)
    foreign(path)
    with pytest.raises(UserError, match=f"x{suffix}: not a feature file .* or damaged"):
        read_features(path)


def foreign(path: Path) -> None:
    """A file of numbers that another program wrote."""
    if path.suffix == ".npz":
        np.savez(path, classes=np.arange(3))
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"label": [1, 2]}), path)
    else:
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["classes"] = np.arange(3)
            file.create_group("about")


@pytest.mark.parametrize("suffix", [".parquet", ".h5"])
def test_a_missing_library_says_how_to_install_it(suffix, tmp_path, monkeypatch) -> None:
    entry = files.FORMATS[suffix]
    monkeypatch.setitem(sys.modules, entry.library, None)
    said = rf"{entry.library} is not installed; run: pip install 'triptych\[{entry.extra}\]'"
    with pytest.raises(UserError, match=said):
        files.file_format(tmp_path / f"x{suffix}")


def test_memory_does_not_grow_with_the_images(tmp_path) -> None:
    """An archive of 60 MB is written and copied in a few MB."""
    batch = {"label": np.zeros(500, np.int64), "final": np.ones((500, 500))}
    tracemalloc.start()
    with npz_of(tmp_path / "x.npz") as append:
        for _ in range(30):
            append(batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "x.npz").stat().st_size > 30 * batch["final"].nbytes
    assert peak < 5 * batch["final"].nbytes
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert archive.testzip() is None


def npz_of(path: Path) -> Any:
    """A writer of an archive."""
    assert files.file_format(path) is npz
    return writing(path, Header((), {}))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_folder_that_is_not_there_is_to_be_made(suffix, tmp_path):
    path = tmp_path / "none" / f"x{suffix}"
    with pytest.raises(UserError) as caught, writing(path, Header((), {})) as append:
        append({"label": np.zeros(2, np.int64), "final": np.zeros((2, 3))})
    line = str(caught.value)
    assert line.startswith(f"{path}: cannot write: ") and "\n" not in line
    assert line.endswith("set --output to a file in a folder that exists and can be written")
