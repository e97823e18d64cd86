"""The environment report must survive whatever a framework does when it is imported."""

import configparser
import json
import re
import runpy
from pathlib import Path

import pytest
from support.data_specs import make_spec

from triptych import backends
from triptych.core.errors import UserError
from triptych.core.machine import environment
from triptych.core.machine.resources import cpu_threads

ROOT = Path(__file__).resolve().parent.parent
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a framework of the given name and source in front of the real one, if any."""

    def make(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        inherited = environment.os.environ.get("PYTHONPATH", str(ROOT / "typings"))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{inherited}")

    monkeypatch.setattr(environment, "why_not", lambda name: "")
    return make


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("raise ImportError('libcudnn.so.8: cannot open shared object file')", "libcudnn"),
        ("raise OSError('no such library')", "no such library"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise RuntimeError('half installed')", "RuntimeError: half installed"),
        ("import os; os._exit(3)", "exit status 3"),
        ("import time; time.sleep(60)", "did not finish within 2 s"),
    ],
)
def test_a_broken_framework_is_reported_in_one_line(fake, source, problem):
    fake("torch", source)
    found = environment.report(["torch"], timeout=2 if "sleep" in source else 60)
    backend = found["backends"]["torch"]
    assert not backend["usable"]
    assert problem in backend["problem"] and "\n" not in backend["problem"]
    assert "pip install" in backend["remedy"]
    text = environment.render(found)
    assert problem in text and backend["remedy"] in text


def test_a_framework_is_tried_without_what_a_launcher_gave(fake, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT", "PADDLE_TRAINERS_NUM"):
        monkeypatch.setenv(name, "2")
    names = "k for k in os.environ if k.startswith(('WORLD', 'RANK', 'MASTER', 'PADDLE_TR'))"
    fake("torch", f"import os; raise RuntimeError(str([{names}]))")
    problem = environment.report(["torch"])["backends"]["torch"]["problem"]
    assert problem == "RuntimeError: []"


def test_a_missing_framework_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(environment, "why_not", lambda name: "")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    missing = environment.report(["torch"])["backends"]["torch"]
    assert missing["problem"] == "not installed"
    assert missing["remedy"] == environment.install_command("torch")
    with pytest.raises(UserError, match="not installed") as error:
        backends.load("torch")
    assert environment.install_command("torch") in str(error.value)


def test_an_interpreter_without_wheels_says_so_and_offers_no_command(monkeypatch):
    monkeypatch.setattr(environment.sys, "version_info", (3, 12, 1))
    assert environment.possible() == ("torch", "paddle")
    oneflow = environment.report(["oneflow"])["backends"]["oneflow"]
    assert "3.10" in oneflow["problem"] and not oneflow["remedy"]


@pytest.mark.one_backend
def test_installed_backend_is_usable(backend, backend_name):
    found = environment.report([backend_name])
    row = found["backends"][backend_name]
    assert row["usable"] and row["devices"][0] == "cpu"
    assert row["versions"] == backend.versions()
    assert f"{backend_name:<9} usable" in environment.render(found)


def test_a_card_that_a_build_has_no_code_for_is_named_with_what_helps(monkeypatch):
    found = {
        "versions": {"paddle": "2.6.2"},
        "cuda": ["", "this build has no code for NVIDIA H100"],
    }
    monkeypatch.setattr(environment, "why_not", lambda name: "")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(environment, "_import_elsewhere", lambda name, timeout: found)
    text = environment.render(environment.report(["paddle"]))
    assert "paddle    usable: paddle 2.6.2; on cpu, cuda:0\n" in text
    assert "          not cuda:1: this build has no code for NVIDIA H100\n" in text
    assert text.endswith(f"pip install paddlepaddle-gpu -i {environment.PADDLE_INDEX}")


def test_report_is_plain_data_about_this_process():
    found = environment.report([])
    assert json.loads(json.dumps(found)) == found
    assert found["cores"] >= 1 and found["memory_gib"] > 0
    assert found["python"]["version"].startswith("3.")


def test_another_pillow_is_pointed_out():
    found = environment.report([])
    assert "will not repeat" not in environment.render({**found, "pillow": environment.PILLOW})
    assert "will not repeat" in environment.render({**found, "pillow": "11.0.0"})


def test_pins_agree_with_the_package():
    assert f"pillow=={environment.PILLOW}" in SETUP["options"]["install_requires"]
    pins = "".join((ROOT / "constraints" / f).read_text() for f in ("common.txt", "pins.txt"))
    assert f"pillow=={environment.PILLOW}" in pins
    extras = SETUP["options.extras_require"]
    for name, requirement in environment.REQUIREMENTS.items():
        for package in re.findall(r"[\w-]+", requirement.replace("'", " "))[:1]:
            assert package in extras[name] and f"{package}==" in pins


def test_set_up_can_ask_before_anything_is_installed():
    """The set-up script runs the file by path with an interpreter that has no packages."""
    source = (ROOT / "core" / "machine" / "environment.py").read_text()
    assert "from triptych" not in source.split("PROBE =")[0]
    assert "numpy" not in re.findall(r"^(?:from|import) (\w+)", source, re.M)
    module = runpy.run_path(str(ROOT / "core" / "machine" / "environment.py"))
    assert module["possible"]() == environment.possible()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, 64),
        ("0::/\n", {"cpu.max": "9900000 100000"}, 64),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/../elsewhere\n", {"cpu.max": "300000 100000"}, 3),
        ("0::/not/mounted\n", {"cpu.max": "300000 100000"}, 3),
        (
            "4:cpu,cpuacct:/d\n3:memory:/d\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            4,
        ),
        (
            "4:cpuacct,cpu:/d\n",
            {"cpu/d/cpu.cfs_quota_us": "250000", "cpu/d/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("", {}, 64),
        ("nonsense\n", {"cpu.max": "nonsense"}, 64),
    ],
)
def test_a_quota_of_the_container_limits_the_cores(groups, files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: range(64))
    monkeypatch.setattr(environment, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(environment, "CONTROL_GROUPS", tmp_path / "cgroup")
    (tmp_path / "own").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert environment.cores() == expected
    assert cpu_threads(make_spec()) == expected


def test_without_control_groups_or_affinity_all_cores_count(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "OWN_GROUPS", tmp_path / "none")
    monkeypatch.delattr(environment.os, "sched_getaffinity")
    assert environment.cores() == environment.os.cpu_count()


def test_the_report_says_how_views_are_made():
    found = environment.report(names=())
    without = environment.render({**found, "fast": {"numba": "", "llvmlite": ""}})
    assert "by Pillow alone, three times slower" in without and "triptych[fast]" in without
    here = environment.render({**found, "fast": {"numba": "1.0", "llvmlite": "2.0"}})
    assert "by compiled loops: numba 1.0, llvmlite 2.0" in here


def test_the_report_says_how_checksums_are_computed():
    found = environment.report(names=())
    without = environment.render({**found, "isal": ""})
    assert "checksums by zlib, four times slower" in without and "triptych[fast]" in without
    assert "checksums by isal 1.9" in environment.render({**found, "isal": "1.9"})
