"""Conversions where no framework is installed: readers and writers need none."""

import json
import subprocess
import sys

import pytest
from support.foreign import NAMES, description, facts_of, path_of

FRAMEWORKS = ("torch", "torchvision", "timm", "oneflow", "paddle")
TARGETS = {
    "moco_v2_resnet18_torch1.9.pth.tar": ("torch", "oneflow", "paddle", "moco", "mmpretrain"),
    "torchvision_resnet18_half_legacy.pth": ("torchvision", "oneflow", "paddle"),
    "mmpretrain_lincls_vit_epoch_1.pth": ("timm", "huggingface", "deit", "libai", "mmpretrain"),
    "plsc_moco_v3_vit.pd": ("plsc", "moco_v3", "paddle"),
}
"""File -> formats to which it is written, too."""
HIDDEN = f"""
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FRAMEWORKS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
from triptych.core.cli import main
print(json.dumps([main(words) for words in json.load(sys.stdin)]))
assert not {{*{FRAMEWORKS}}} & set(sys.modules)
"""


def options_of(file):
    """What a user has to say about a file: heads, and which of two sets of weights."""
    if file not in NAMES:
        return []
    options = [word for key, value in facts_of(file).items() for word in ("-o", f"{key}={value}")]
    average = description(file).get("average")
    return options if average is None else [*options, "--average", json.dumps(average)]


@pytest.mark.parametrize("file", sorted({*NAMES, *TARGETS}))
def test_each_file_is_converted_without_any_framework(file, tmp_path):
    source, options = path_of(file, tmp_path), options_of(file)
    commands = [
        ["convert", str(source), str(tmp_path / f"to-{target}"), "--to", target, *options]
        for target in ("canonical", *TARGETS.get(file, ()))
    ]
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN], input=json.dumps(commands), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * len(commands), done.stderr
