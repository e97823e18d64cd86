"""Ctrl-C and SIGTERM while a run starts: the process leaves, with the signal's own status."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from triptych.core.machine import interrupts

START = """
import sys

class Report:
    def find_spec(self, name, path=None, target=None):
        if name == "SLOW":
            print("importing", flush=True)

sys.meta_path.insert(0, Report())
from triptych.core.cli import main
sys.exit(main(["train", "-c", "moco_v3/digits", "--output", sys.argv[1], "--backend", "BACKEND"]))
"""
"""A run that says when it is about to import the slow part of its framework."""
SLOW = {"torch": "torch._C", "oneflow": "oneflow._C", "paddle": "paddle.tensor"}


def test_ctrl_c_during_the_import_of_a_framework_ends_a_run(backend_name, backend, tmp_path):
    source = START.replace("SLOW", SLOW[backend_name]).replace("BACKEND", backend_name)
    command = [sys.executable, "-c", source, str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "spec: moco_v3/digits\n"
        assert child.stdout.readline() == "importing\n"
        child.send_signal(signal.SIGINT)
        said, errors = child.communicate(timeout=60)
    assert (child.returncode, said) == (128 + signal.SIGINT, "")
    assert "error" not in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_a_signal_waits_while_a_module_seizes_the_handlers(tmp_path, monkeypatch):
    lines = ("def seize(*_):", "    os._exit(255)", "signal.signal(2, seize)")
    kill = "signal.pthread_kill(threading.main_thread().ident, 2)"
    source = "\n".join(("import os, signal, threading", *lines, kill, "done = True\n"))
    (tmp_path / "seizer.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(interrupts, "SEIZERS", ("seizer",))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(KeyboardInterrupt), interrupts.interrupts_kept():
        __import__("seizer")
    assert sys.modules["seizer"].done
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    os.kill(os.getpid(), 2)\nexcept BaseException as e:\n    raise ImportError(e)",
        "try:\n    os.kill(os.getpid(), 2)\nexcept BaseException:\n    pass",
    ],
    ids=["made an ImportError", "swallowed"],
)
def test_an_interrupt_survives_whatever_an_import_makes_of_it(source, tmp_path, monkeypatch):
    (tmp_path / "greedy.py").write_text(
        f"import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: None)\n{source}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    finders, before = list(sys.meta_path), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupts.interrupts_kept():
        __import__("greedy")
    assert sys.meta_path == finders
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    sys.modules.pop("greedy", None)


def test_a_handler_that_an_import_has_taken_is_put_back_by_the_next_one(tmp_path, monkeypatch):
    (tmp_path / "taker.py").write_text(
        "import os, signal\n"
        "signal.signal(signal.SIGINT, lambda *_: None)\n"
        "import nothing_of_this_name\n"
    )
    (tmp_path / "nothing_of_this_name.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(KeyboardInterrupt), interrupts.interrupts_kept():
        __import__("taker")
    assert "taker" not in sys.modules


def test_leaving_flushes_what_was_said_and_an_ignored_signal_stays_ignored():
    source = (
        "import os, signal\n"
        "from triptych.core.machine.interrupts import leave_at_once\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('said')\n"
        "with leave_at_once():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('ignored')\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "said\nignored\n")


def test_the_handlers_come_back_and_threads_change_none():
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with interrupts.leave_at_once():
        inside = [signal.getsignal(number) for number in interrupts.SIGNALS]
        assert all(handler is not old for handler, old in zip(inside, before, strict=True))
        with interrupts.interrupts_kept():
            assert [signal.getsignal(number) for number in interrupts.SIGNALS] == inside
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before
    failures = []

    def inside_a_thread():
        try:
            with interrupts.leave_at_once(), interrupts.interrupts_kept():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=inside_a_thread)
    thread.start()
    thread.join()
    assert not failures


def test_a_request_to_end_lets_files_be_removed():
    before, removed = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as stop, interrupts.leave_tidily():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            removed.append("an unfinished file")
    assert (stop.value.code, removed) == (128 + signal.SIGTERM, ["an unfinished file"])
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_lets_files_be_removed_where_a_signal_would_end_the_process():
    removed = []
    with interrupts.leave_at_once(), pytest.raises(KeyboardInterrupt), interrupts.leave_tidily():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            removed.append("an unfinished file")
    assert removed == ["an unfinished file"]
