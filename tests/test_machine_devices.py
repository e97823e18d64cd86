"""Which device a run gets, on machines whose cards are made up."""

import ctypes
from types import SimpleNamespace

import pytest
from support.native import lively_state, tiny_spec

from triptych.core.errors import UserError
from triptych.core.machine import cuda, devices
from triptych.core.machine.cuda import Card

H100, A100, OLD = Card("NVIDIA H100", (9, 0)), Card("NVIDIA A100", (8, 0)), Card("K40", (3, 5))
WHEEL = ("sm_75", "sm_80", "sm_86", "compute_86")
"""What a framework might be compiled for."""


@pytest.fixture
def machine(monkeypatch):
    """Makes a machine with the given cards."""
    monkeypatch.delenv(devices.DEVICE_VARIABLE, raising=False)
    devices._warn.cache_clear()

    def make(*cards):
        monkeypatch.setattr(cuda, "cards", lambda: cards)

    return make


def spec(device="auto"):
    return tiny_spec().model_copy(update={"device": device})


@pytest.mark.parametrize(
    ("capability", "code", "runs"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_60", "sm_70", "sm_80", "sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((7, 5), ["compute_80"], False),
        ((12, 0), ["sm_90", "sm_120"], True),
        ((10, 3), ["sm_90a", "sm_100a"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 0), ["gfx90a"], False),
        ((9, 0), [], False),
    ],
)
def test_code_serves_its_major_number_and_ptx_what_is_newer(capability, code, runs):
    assert cuda.runs_on(capability, code) is runs


def test_auto_takes_the_first_card_that_there_is_code_for(machine, capsys):
    machine(H100, A100)
    assert devices.pick_device(spec(), "torch", 2, ("sm_80",)) == "cuda:1"
    assert devices.pick_device(spec(), "torch", 2, WHEEL) == "cuda:0"
    assert devices.pick_device(spec("cuda:1"), "torch", 2, WHEEL) == "cuda:1"
    assert devices.pick_device(spec("cpu"), "torch", 2, WHEEL) == "cpu"
    assert devices.pick_device(spec(), "torch", 0, WHEEL) == "cpu"
    assert capsys.readouterr().err == ""


def test_each_process_of_a_machine_has_the_card_of_its_number(machine, monkeypatch):
    machine(H100, A100)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for number in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(number))
        for device in ("auto", "cuda"):
            found = devices.pick_device(spec(device), "torch", 2, WHEEL)
            assert found == f"cuda:{number}"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this machine has no card, torch sees 2"):
        devices.pick_device(spec(), "torch", 2, WHEEL)


def test_auto_falls_back_to_the_cpu_and_says_so_once(machine, capsys):
    machine(OLD)
    for _ in range(2):
        assert devices.pick_device(spec(), "torch", 1, WHEEL) == "cpu"
    assert capsys.readouterr().err == (
        "warning: device: auto takes the CPU, since this build of torch has no code for K40 "
        "(sm_35), only for sm_75, sm_80, sm_86, compute_86\n"
    )


def test_a_card_without_code_that_is_asked_for_by_name_is_one_error(machine):
    machine(OLD)
    with pytest.raises(UserError, match=r"'cuda', but .* no code for K40 .*; use device=cpu$"):
        devices.pick_device(spec("cuda"), "torch", 1, WHEEL)
    machine()
    with pytest.raises(UserError, match=r"libcuda.so.1.* does not say what cuda:0 is"):
        devices.pick_device(spec("cuda"), "torch", 1, WHEEL)


def test_an_error_names_the_variable_that_asks_for_the_device(machine, monkeypatch):
    machine()
    monkeypatch.setenv(devices.DEVICE_VARIABLE, "cuda:1")
    with pytest.raises(UserError, match=r"^TRIPTYCH_DEVICE=cuda:1, but torch sees 0 CUDA"):
        devices.pick_device(spec(), "torch", 0, WHEEL)
    with pytest.raises(UserError, match=r"^device: 'cuda', but torch sees 0 CUDA"):
        devices.pick_device(spec("cuda"), "torch", 0, WHEEL)


def test_no_backend_walks_into_a_card_that_it_has_no_code_for(
    backend, backend_name, machine, monkeypatch, capsys
):
    """OneFlow's wheel has none for an H100, and would end the process there."""
    card = H100 if backend_name == "oneflow" else OLD
    machine(card)
    monkeypatch.setattr(backend, "cuda_devices", lambda: 1)
    engine = backend.build(spec(), lively_state(spec()))
    assert engine.context.device == "cpu"
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"this build of {backend_name} has no code for {card}" in error
    with pytest.raises(UserError, match="use device=cpu"):
        backend.build(spec("cuda:0"), lively_state(spec()))


def test_the_driver_is_asked_for_name_and_capability(monkeypatch):
    def set_to(reference, value):
        ctypes.cast(reference, ctypes.POINTER(ctypes.c_int))[0] = value
        return 0

    driver = SimpleNamespace(
        cuInit=lambda flags: 0,
        cuDeviceGetCount=lambda count: set_to(count, 2),
        cuDeviceGet=lambda device, number: set_to(device, number + 40),
        cuDeviceGetName=lambda name, size, device: setattr(name, "value", b"%d" % device.value),
        cuDeviceGetAttribute=lambda to, key, device: set_to(to, {75: 9, 76: device.value}[key]),
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert cuda.cards() == (Card("40", (9, 40)), Card("41", (9, 41)))
    driver.cuInit = lambda flags: 100  # no device
    assert cuda.cards() == ()


def test_without_a_driver_there_are_no_cards(monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", "libno-such-driver.so.1")
    assert cuda.cards() == ()


def test_comparisons_are_on_the_cpu_unless_a_device_is_named(monkeypatch):
    monkeypatch.delenv(devices.DEVICE_VARIABLE, raising=False)
    assert devices.on_compared_device(spec()).device == "cpu"
    assert devices.on_compared_device(spec("cuda:1")).device == "cuda:1"
    assert devices.wanted_device(spec()) == "auto"
    monkeypatch.setenv(devices.DEVICE_VARIABLE, "cuda")
    assert devices.on_compared_device(spec()).device == devices.wanted_device(spec()) == "cuda"
    assert devices.on_compared_device(spec("cpu")).device == "cpu"
    monkeypatch.setenv(devices.DEVICE_VARIABLE, "gpu")
    with pytest.raises(UserError, match="TRIPTYCH_DEVICE=gpu: expected auto, cpu, cuda or cuda:N"):
        devices.wanted_device(spec())


def test_the_stamp_names_card_libraries_and_switches(machine):
    machine(A100, H100)
    libraries = {"cuda": "12.6", "cudnn": 90501}
    assert devices.compute_stamp(spec(), "cuda:1", libraries, repeats=True) == {
        **{"device": "NVIDIA H100", "cuda": "12.6", "cudnn": "90501"},
        **{"tf32": "off", "deterministic": "yes", "compiled": "no"},
    }
    tf32 = spec().model_copy(update={"precision": "tf32"})
    stamp = devices.compute_stamp(tf32, "cuda:0", libraries, repeats=False)
    assert (stamp["device"], stamp["tf32"], stamp["deterministic"]) == ("NVIDIA A100", "on", "no")
    stamp = devices.compute_stamp(spec(), "cpu", libraries, repeats=True, compiled=True)
    assert stamp == {"device": "cpu", "compiled": "yes"}


def test_networks_are_compiled_on_a_gpu_or_where_the_spec_says_so():
    def compiles(device, wanted="auto", able=True, **degrees):
        asked = tiny_spec(train={"compile": wanted}, parallel=degrees)
        return devices.compiles(asked, "paddle", device, able=able)

    assert compiles("cuda:0") and compiles("cuda:1", data=2) and compiles("cpu", wanted=True)
    assert not compiles("cpu") and not compiles("cuda:0", wanted=False)
    assert not compiles("cuda:0", able=False) and not compiles("cuda:0", tensor=2)
    assert not compiles("cuda:0", pipeline=2)
    with pytest.raises(UserError, match="compile: true: paddle has no compiler; use auto, or"):
        compiles("cuda:0", wanted=True, able=False)
    with pytest.raises(UserError, match=r"with parallel.tensor processes meet .*; use auto"):
        compiles("cuda:0", wanted=True, tensor=2)


def test_every_backend_says_what_it_computes_on(backend, machine, monkeypatch):
    assert backend.compute(spec("cpu")) == {"device": "cpu", "compiled": "no"}
    machine(A100)
    monkeypatch.setattr(backend, "cuda_devices", lambda: 1)
    monkeypatch.setattr(backend, "cuda_code", lambda: ("sm_80",))
    found = backend.compute(spec().model_copy(update={"precision": "float32"}))
    assert found["device"] == "NVIDIA A100"
    assert list(found) == ["device", "cuda", "cudnn", "tf32", "deterministic", "compiled"]
