"""What frameworks say where a device cannot go on, and the line that it becomes."""

import pytest
from support.native import draws, hyper, lively_state, random_batch, tiny_spec

from triptych.core.errors import DeviceError
from triptych.core.machine.failures import device_failures

PADDLE = "\n\n----------\nError Message Summary:\n----------\n"
MEMORY = "device: cuda:0 has not enough memory for train.batch_size 8; use train.batch_size=4 or"

COMPILER = "no compiler for cuda:0 works here; use train.compile=false"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total", MEMORY),
        (f"{PADDLE}ResourceExhaustedError: \n\nOut of memory error on GPU 0. Cannot", MEMORY),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", MEMORY),
        ("CUDA error: no kernel image is available for execution on the device", "no code for"),
        (f"{PADDLE}ExternalError: CUDA error(209), no kernel image is available", "no code for"),
        (
            "nll_loss2d_forward_out_cuda_template does not have a deterministic implementation",
            "nll_loss2d_forward_out_cuda_template has no such kernel on cuda:0; use determin",
        ),
        (
            "backend='inductor' raised:\nTritonMissing: Cannot find a working triton installation",
            COMPILER,
        ),
        ("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.con", COMPILER),
        ("RuntimeError: Failed to find C compiler. Please specify via CC", COMPILER),
        (
            "CppCompileError: C++ compile error\n\nCommand:\ng++ x.main.cpp\n\nOutput:\n",
            "the compiler failed or was ended; use train.compile=false or try again",
        ),
    ],
)
def test_a_failure_of_the_device_is_one_line_with_a_remedy(text, line):
    with (
        pytest.raises(DeviceError) as caught,
        device_failures((RuntimeError,), tiny_spec(), "cuda:0"),
    ):
        raise RuntimeError(text)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert "; use " in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("out of memory")])
def test_other_errors_stay_what_they_are(error):
    with (
        pytest.raises(type(error)) as caught,
        device_failures((RuntimeError,), tiny_spec(), "cuda:0"),
    ):
        raise error
    assert caught.value is error


def test_each_framework_says_it_in_a_way_that_is_known(backend, backend_name, monkeypatch):
    if backend_name == "oneflow":
        pytest.skip("OneFlow ends the process where memory is out")
    spec = tiny_spec()
    engine = backend.build(spec, lively_state(spec))

    def too_large(array):
        if backend_name == "torch":
            import torch

            return torch.empty(1 << 50)
        import paddle

        return paddle.zeros([1 << 45])

    monkeypatch.setattr(engine, "tensor", too_large)

    for act in (
        lambda: engine.train_step(random_batch(spec), draws(spec), hyper()),
        lambda: engine.embed(random_batch(spec).views[0]),
    ):
        with pytest.raises(DeviceError, match=r"^device: cpu has not enough .*train.batch_size=4$"):
            act()
