"""A command imports what it uses: helps and errors in a spec come without any large library."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

from triptych.core import cli

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    *("autograd", "scipy", "sklearn", "tensorboard"),
    *("torch", "torchvision", "timm", "oneflow", "flowvision", "paddle"),
}
SCRIPT = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from triptych.core.cli import main

seen = {}
for words in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        try:
            status = main(words)
        except SystemExit as stop:
            status = stop.code
    seen[" ".join(words)] = [status, err.getvalue(), sorted(sys.modules)]
print(json.dumps(seen))
"""


def loaded(*commands: list[str]) -> dict[str, tuple[int, str, set[str]]]:
    """Command lines, run one after the other in one new process: status, errors, all modules."""
    line = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    return {words: (status, err, set(names)) for words, (status, err, names) in found.items()}


def test_a_help_and_an_error_in_a_spec_load_no_large_library():
    wrong = ["-c", "moco_v3/digits", "-o", "model.depht=3"]
    helps = [[name, "--help"] for name in cli.COMMANDS]
    deeper = [["parity", "trace", "--help"], ["bench", "step", "--help"]]
    with_spec = [["train"], ["info"], ["parity", "trace"], ["parity", "run"], ["bench", "step"]]
    errors = [[*words, *wrong] for words in with_spec]
    errors[2].append("x.npz")
    errors.append(["eval", "knn", "--weights", "x", *wrong])
    found = loaded(*helps, *deeper, *errors)
    for words, (status, err, modules) in found.items():
        assert not HEAVY & modules, words
        assert status == (0 if words.endswith("--help") else 2), (words, err)
        assert ("model.depht" in err) == (status == 2), (words, err)


def test_the_parser_imports_the_chosen_command_alone():
    found = loaded(["--help"], ["info", "--help"])
    assert not {"numpy", "pydantic", "yaml"} & found["--help"][2]
    commands = {f"triptych.core.commands.{name}" for name in cli.COMMANDS}
    assert not commands & found["--help"][2]
    assert commands & found["info --help"][2] == {"triptych.core.commands.info"}


def test_each_command_is_listed_and_has_its_module_and_its_tool(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {text}" in printed for name, text in cli.COMMANDS.items())
    tools = {path.stem: path.read_text() for path in (ROOT / "tools").glob("*.py")}
    modules = {module.name for module in pkgutil.iter_modules([str(ROOT / "core" / "commands")])}
    assert tools.keys() == modules == set(cli.COMMANDS)
    assert all(f'main(["{name}", *sys.argv[1:]])' in tool for name, tool in tools.items())
