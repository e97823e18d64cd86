"""What a run says of the files that a library warns of."""

import numpy as np
from PIL import Image
from support.data_specs import bad_exif
from support.double import finished, install, tiny

from triptych.core.runs.log import read_rows


def test_files_with_warnings_are_named_once_and_counted(tmp_path, capfd, monkeypatch):
    install(monkeypatch)
    for number in range(5):
        for half in ("train", "val"):
            bad_exif(tmp_path / half / "ab"[number % 2] / f"{number}.jpg", number)
    data = f"data={{name: image_folder, root: {tmp_path / 'train'}, eval_root: {tmp_path / 'val'}}}"
    channels = ("data.channels=1", "train.batch_size=4", "evaluate.every=6", "evaluate.k=5")
    folder = finished(tiny(data, *channels), tmp_path / "run")
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert sorted(line.split(": ")[1] for line in said) == sorted(
        str(tmp_path / half / "ab"[number % 2] / f"{number}.jpg")
        for half in ("train", "val")
        for number in range(5)
    )
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["image_warnings"] for row in rows if "eval" not in row][-1] == 5
    assert {row["image_warnings"] for row in rows if "eval" in row} == {10}


def test_images_of_few_levels_are_told_of_in_a_line_of_their_own(tmp_path, monkeypatch):
    install(monkeypatch)
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for number in range(4):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / "a" / f"{number}.png")
    spec = tiny(
        f"data={{name: image_folder, root: {tmp_path / 'a'}}}",
        *("data.channels=1", "train.batch_size=4", "train.steps=1", "optim.warmup_steps=0"),
    )
    said: list[str] = []
    finished(spec, tmp_path / "run", say=said.append)
    (line,) = (line for line in said if "data.bits=12" in line)
    assert line.startswith(f"warning: {tmp_path / 'a' / '0.png'}") and "\n" not in line
