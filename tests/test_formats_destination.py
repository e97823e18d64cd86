"""What a conversion writes: whole or not at all, whatever happens meanwhile."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fuzz_trees import fuzz
from support.golden_weights import official_state
from test_formats_conversion import HEADS, PLSC, converted, npz, planned

from triptych.core.errors import UserError
from triptych.core.files import reading, saving
from triptych.core.files.tree import Stored
from triptych.core.formats import destination, load_weights

QKV = "module.base_encoder.blocks.0.attn.qkv.weight"


def test_nothing_is_replaced_by_a_half_written_file(tmp_path: Path):
    arrays = dict(official_state("moco_v3_vit_tiny"))
    arrays["predictor.3.weight"] = np.full_like(arrays["predictor.3.weight"], np.nan)
    source = npz(tmp_path / "w.npz", arrays)
    for name, target in (("out.pth", "moco_v3"), ("out", "canonical")):
        path = tmp_path / name
        saving.write(path, {"x": Stored.of(np.ones(2))}, "torch")
        before = path.read_bytes()
        with pytest.raises(UserError, match=r"predictor.3.weight: 16384 of 16384 .* not finite"):
            converted(source, path, target)
        assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.pth", "w.npz"]


def test_a_slice_of_changed_checkpoints_is_converted_or_refused():
    assert sum(fuzz(8, seed=3).values()) == 8


def test_a_flipped_bit_is_found_before_anything_is_replaced(tmp_path: Path):
    converted(PLSC, tmp_path / "w.pth", "moco_v3")
    content = bytearray((tmp_path / "w.pth").read_bytes())
    place = content.index(reading.read(tmp_path / "w.pth").tree["state_dict"][QKV].bits().tobytes())
    content[place] ^= 1
    (tmp_path / "w.pth").write_bytes(content)
    reason = f"{tmp_path}/w.pth: .* is damaged .its checksum differs.: fetch the file again"
    for target, name in (("canonical", "c"), ("plsc", "w.pd"), ("libai", "run")):
        with pytest.raises(UserError, match=reason):
            converted(tmp_path / "w.pth", tmp_path / name, target)
    with pytest.raises(UserError, match=reason):
        destination.examine(planned(tmp_path / "w.pth", "canonical"))
    with pytest.raises(UserError, match=reason):
        spec = planned(tmp_path / "w.pth", "canonical").spec
        load_weights(tmp_path / "w.pth", spec)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(stream: Any, array: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(saving, "stream_values", full)
    with pytest.raises(UserError, match=r"out: cannot write: No space left on device; free some"):
        converted(PLSC, tmp_path / "out", "canonical")
    assert not list(tmp_path.iterdir())


def test_destinations_that_would_lose_something_are_refused(tmp_path: Path):
    folder, file = tmp_path / "mine", tmp_path / "file"
    folder.mkdir()
    file.touch()
    for path, force, message in (
        (file, False, "exists; give another name, or --force"),
        (folder, True, "a folder that holds no weights is never replaced"),
        (tmp_path, True, "holds the file that is converted"),
        (tmp_path / "a" / "b", False, "there is no folder .*a; make it first"),
    ):
        with pytest.raises(UserError, match=message):
            destination.check(path, file if path == tmp_path else PLSC, force=force)
    destination.check(file, PLSC, force=True)


SLOW = """
import sys, time
from triptych.core.cli import main
from triptych.core.files import saving
write = saving.stream_values
def slowly(stream, array):
    print("writing", flush=True)
    time.sleep(60)
saving.stream_values = slowly
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_behind(tmp_path: Path, number: signal.Signals):
    command = [sys.executable, "-c", SLOW, str(PLSC), str(tmp_path / "out"), "--to", "canonical"]
    command += ["-o", *HEADS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert any(line == "writing\n" for line in process.stdout)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert not list(tmp_path.iterdir())
