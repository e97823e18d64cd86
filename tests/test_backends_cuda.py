"""What a backend does for a GPU, seen where there is none: environments and switches."""

import os
import subprocess
import sys

import pytest
from support.native import lively_state, tiny_spec

from triptych.core.errors import UserError
from triptych.core.machine import devices

IMPORT = """
import sys
from triptych import backends
from triptych.core import config, launch
name, precision = sys.argv[1:]
if precision == "api":
    backends.load(name)
launch.load(config.load("moco_v3/digits", [f"precision={precision}"]), name)
"""
FRAMEWORK = """
import os
names = "NVIDIA_TF32_OVERRIDE", "ONEFLOW_EP_CUDA_ENABLE_TF32_EXECUTION", "CUBLAS_WORKSPACE_CONFIG"
print([os.environ.get(name) for name in names], flush=True)
os._exit(0)
"""
"""In the place of a framework: says what is set when it is imported."""


@pytest.mark.parametrize(("precision", "on"), [("float32", "0"), ("tf32", "1"), ("api", "0")])
def test_tf32_is_chosen_before_the_framework_is_imported(
    backend, backend_name, tmp_path, precision, on
):
    (tmp_path / f"{backend_name}.py").write_text(FRAMEWORK)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    for name in (*devices.TF32_VARIABLES, devices.WORKSPACE_VARIABLE):
        environment.pop(name, None)
    command = [sys.executable, "-c", IMPORT, backend_name, precision]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str([on, on, ":4096:8"])], done.stderr


def test_tf32_is_refused_by_name_on_the_cpu(backend, backend_name):
    with pytest.raises(UserError, match=f"precision: {backend_name} has no tf32 on cpu"):
        backend.build(tiny_spec("tf32"), lively_state(tiny_spec()))


def test_a_process_that_was_begun_for_another_precision_says_so(backend, backend_name, monkeypatch):
    for name in devices.TF32_VARIABLES:
        monkeypatch.setenv(name, "0")
    spec = tiny_spec("tf32")
    with pytest.raises(UserError, match=r"tf32 needs NVIDIA_TF32_OVERRIDE=1 before .* it is 0;"):
        devices.check_precision(spec, backend_name, "cuda:0", backend.PRECISIONS)
    devices.prepare_libraries("tf32")
    devices.check_precision(spec, backend_name, "cuda:0", backend.PRECISIONS)
    monkeypatch.setenv("ONEFLOW_EP_CUDA_ENABLE_TF32_EXECUTION", "1")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(UserError, match="float32 needs ONEFLOW_EP_CUDA_ENABLE_TF32_EXECUTION=0"):
        devices.check_precision(tiny_spec("float32"), backend_name, "cuda:0", backend.PRECISIONS)


def test_compilation_is_refused_by_name_where_there_is_none(backend, backend_name):
    spec = tiny_spec(train={"compile": True})
    if backend_name == "torch":
        assert backend.compute(spec)["compiled"] == "yes"
        return
    with pytest.raises(UserError, match=f"train.compile: true: {backend_name} has no compiler"):
        backend.build(spec, lively_state(spec))


@pytest.fixture
def own(backend, backend_name, request):
    """The backend that a test is about, and no other; its switches are set back afterwards."""
    if backend_name != request.param:
        pytest.skip("switches of another backend")
    yield backend
    backend._choose_kernels(tiny_spec("float32"), "cpu")


LOOSE = {"precision": "tf32", "deterministic": False}


@pytest.mark.parametrize("own", ["torch"], indirect=True)
def test_switches_of_pytorch(own):
    import torch

    def switches():
        return (
            *(torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
            torch.are_deterministic_algorithms_enabled(),
            *(torch.backends.cudnn.deterministic, not torch.backends.cudnn.benchmark),
        )

    spec = tiny_spec("float32")
    own._choose_kernels(spec, "cuda:0")
    assert switches() == (False, False, True, True, True)
    own._choose_kernels(spec.model_copy(update=LOOSE), "cuda:0")
    assert switches() == (True, True, False, False, False)
    own._choose_kernels(spec, "cpu")
    assert switches() == (False, False, False, True, True)


@pytest.mark.parametrize("own", ["paddle"], indirect=True)
def test_switches_of_paddle(own, monkeypatch):
    import paddle

    core, said = paddle.base.core, []
    for name in ("set_cublas_switch", "set_cudnn_switch"):
        monkeypatch.setattr(
            core, name, lambda on, name=name: said.append((name, on)), raising=False
        )
    monkeypatch.setattr(paddle, "set_device", said.append)
    monkeypatch.setattr(paddle, "set_flags", lambda flags: said.extend(flags.items()))
    spec = tiny_spec("float32")
    for one, on in ((spec, False), (spec.model_copy(update=LOOSE), True)):
        said.clear()
        own._choose_kernels(one, "cuda:0")
        assert said == [
            *(("set_cublas_switch", on), ("set_cudnn_switch", on)),
            "gpu:0",
            ("FLAGS_cudnn_deterministic", not on),
        ]
