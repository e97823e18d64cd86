"""mypy holds methods and backends to the protocols of ``core.contracts``: wrong ones must fail."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EPS = ("l2_normalize(x: Tensor, /, *, eps", "l2_normalize(x: Tensor, /, *, epsilon")
WRONG = {
    "reference": ("core/reference/ops.py", "Ops", *EPS),
    "torch": ("backends/torch/ops.py", "Ops", *EPS),
    "oneflow": ("backends/oneflow/ops.py", "Ops", *EPS),
    "paddle": ("backends/paddle/ops.py", "Ops", *EPS),
    "finish": (
        "core/methods/moco.py",
        "Method[QueueModel, QueueSpec]",
        "def finish(model: QueueModel, outcome: Outcome, hyper: Hyper)",
        "def finish(model: QueueModel)",
    ),
    "chance": (
        "core/methods/moca.py",
        "Method[MocaModel, MocaSpec]",
        "def chance(spec: RunSpec) -> float",
        "def chance(spec: RunSpec) -> str",
    ),
    "predict": (
        "core/methods/moco_v3.py",
        "Method[Model, MocoV3Spec]",
        "part: Batch, number: int) -> Tensor",
        "part: Batch) -> Tensor",
    ),
}
"""Name -> file, its contract, and what is changed to what."""
HEAD = """from triptych.core.config.spec import MocaSpec, MocoV3Spec, QueueSpec
from triptych.core.contracts import MocaModel, Method, Model, Ops, QueueModel
"""
# The frameworks themselves are left out, which takes a minute less.
CONFIG = """[mypy]
mypy_path = {typings}
namespace_packages = True
explicit_package_bases = True
plugins = pydantic.mypy
[mypy-torch.*,timm.*,torchvision.*,paddle.*]
follow_imports = skip
ignore_missing_imports = True
[mypy-triptych.*]
ignore_errors = True
"""


@pytest.mark.soak  # the type checker takes as long as a hundred other tests
def test_a_wrong_signature_is_an_error(tmp_path):
    """Of a copy of each file nothing is reported, of the changed copy its contract."""
    pytest.importorskip("mypy")
    check = HEAD
    for name, (file, contract, right, wrong) in WRONG.items():
        source = (ROOT / file).read_text()
        assert source.count(right) == 1
        (tmp_path / f"right_{name}.py").write_text(source)
        (tmp_path / f"wrong_{name}.py").write_text(source.replace(right, wrong))
        check += f"import right_{name}, wrong_{name}\n"
        check += f"a_{name}: {contract} = right_{name}\nb_{name}: {contract} = wrong_{name}\n"
    (tmp_path / "check.py").write_text(check)
    (tmp_path / "mypy.ini").write_text(CONFIG.format(typings=ROOT / "typings"))
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "check.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    refused = [line for line in done.stdout.splitlines() if line.startswith("check.py")]
    errors = [line for line in refused if "error: Incompatible types in assignment" in line]
    assert [line for line in refused if ": error:" in line] == errors
    lines = check.splitlines()
    assert [lines[int(line.split(":")[1]) - 1].split(":")[0] for line in errors] == [
        f"b_{name}" for name in WRONG
    ], done.stdout
