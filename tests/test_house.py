"""The rules of the house, read from the source: each rule, and a source that breaks it."""

import ast
import configparser
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from triptych import backends

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = {
    "torch": {"torch", "torchvision", "timm"},
    "oneflow": {"oneflow", "flowvision"},
    "paddle": {"paddle"},
}
FILES = [
    path.relative_to(ROOT)
    for folder in ("core", "backends", "tools", "tests", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
Rule = Callable[[Path, ast.Module], Iterator[str]]


def imports(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported, inside functions and by string too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ("triptych", *path.parent.parts)
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            if ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def is_in(name: str, *packages: str) -> bool:
    """Whether a dotted name is one of the packages, or inside one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def core_imports_no_framework(path: Path, tree: ast.Module) -> Iterator[str]:
    """core knows no framework; backends are loaded by name, through ``triptych.backends``."""
    if path.parts[0] != "core":
        return
    for line, name in imports(path, tree):
        if is_in(name, *set.union(*FRAMEWORKS.values())):
            yield f"line {line}: core imports {name}"
        if any(is_in(name, f"triptych.backends.{backend}") for backend in FRAMEWORKS):
            yield f"line {line}: core imports {name}"


FLOORS = (
    ("__init__", "errors", "random"),
    ("config",),
    ("contracts",),
    ("parameters", "machine"),
    ("optim", "files", "parallel"),
    ("methods",),
    ("inference",),
    ("engine",),
    ("backends", "data", "reference"),
    ("evaluation",),
    ("runs",),
    ("launch",),
    ("checkpoint", "published"),
    ("formats",),
    ("parity",),
    ("report",),
    ("training",),
    ("api", "cli", "results"),
    ("sharing",),
    ("benchmarks", "commands"),
)
"""Rooms and single files of core, and backends as core sees them: who imports stands higher."""


def rooms_import_downwards(path: Path, tree: ast.Module) -> Iterator[str]:
    """A room of core imports itself and rooms of lower floors, so there can be no circle."""
    if path.parts[0] != "core" or path == Path("core/__init__.py"):
        return  # the package gives the Python interface when it is asked for it
    level = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    own = path.with_suffix("").parts[1]
    if own not in level:
        yield f"room {own} has no floor: add it to FLOORS"
        return
    for line, name in imports(path, tree):
        parts = name.split(".")
        if parts[0] != "triptych" or len(parts) < 2:
            continue
        room = parts[1] if parts[1] == "backends" else [*parts[2:], "__init__"][0]
        if room not in level and not (ROOT / "core" / room).with_suffix(".py").exists():
            room = "__init__"  # a name that core itself defines
        if room != own and level.get(room, len(FLOORS)) >= level[own]:
            yield f"line {line}: {own} imports {name}, which is not on a lower floor"


def backends_do_not_meet(path: Path, tree: ast.Module) -> Iterator[str]:
    """A backend imports its own framework; ``backends/__init__.py`` imports none."""
    if path.parts[0] != "backends":
        return
    own = path.parts[1] if len(path.parts) > 2 else ""
    for line, name in imports(path, tree):
        for other in set(FRAMEWORKS) - {own}:
            if is_in(name, f"triptych.backends.{other}", *FRAMEWORKS[other]):
                yield f"line {line}: imports {name}"


def tools_import_core_only(path: Path, tree: ast.Module) -> Iterator[str]:
    """A tool parses, calls once and exits."""
    if path.parts[0] != "tools":
        return
    for line, name in imports(path, tree):
        top = name.split(".")[0]
        if not is_in(name, "triptych.core") and top not in sys.stdlib_module_names:
            yield f"line {line}: a tool imports {name}"


def no_assert_outside_tests(path: Path, tree: ast.Module) -> Iterator[str]:
    """An assert vanishes under -O, and its message is no help to a user."""
    if path.parts[0] != "tests":
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                yield f"line {node.lineno}: assert outside tests"


def no_broad_except(path: Path, tree: ast.Module) -> Iterator[str]:
    """Catching everything hides bugs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = ast.unparse(node.type) if node.type else "everything"
            if names in ("everything", "Exception", "BaseException"):
                yield f"line {node.lineno}: catches {names}"


def functions_are_short(path: Path, tree: ast.Module) -> Iterator[str]:
    """Below 60 lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length >= 60:
                yield f"line {node.lineno}: {node.name} has {length} lines"


def files_are_short(path: Path, tree: ast.Module) -> Iterator[str]:
    """Below 400 lines."""
    last = max((getattr(node, "end_lineno", 0) or 0 for node in ast.walk(tree)), default=0)
    if last >= 400:
        yield f"{last} lines"


def public_functions_are_described(path: Path, tree: ast.Module) -> Iterator[str]:
    """Public functions and methods are annotated and have a docstring."""
    if path.parts[0] not in ("core", "backends"):
        return
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    for scope in (tree, *classes):
        for node in scope.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            # A module's forward is described by its class.
            described = node if node.name != "forward" else scope
            if not ast.get_docstring(described):
                yield f"line {node.lineno}: {node.name} has no docstring"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in SELF]
            if bare or node.returns is None:
                yield f"line {node.lineno}: {node.name} is not fully annotated {bare}"


SELF = ("self", "cls")
RULES: list[Rule] = [
    core_imports_no_framework,
    rooms_import_downwards,
    backends_do_not_meet,
    tools_import_core_only,
    no_assert_outside_tests,
    no_broad_except,
    functions_are_short,
    files_are_short,
    public_functions_are_described,
]
BROKEN = [
    (core_imports_no_framework, "core/x.py", "def f():\n    import torch.nn"),
    (core_imports_no_framework, "core/x.py", "from timm.models import vit"),
    (core_imports_no_framework, "core/a/x.py", "from ...backends.torch import ops"),
    (core_imports_no_framework, "core/x.py", "import importlib\nimportlib.import_module('paddle')"),
    (rooms_import_downwards, "core/config/x.py", "from triptych.core.methods import moca"),
    (rooms_import_downwards, "core/engine.py", "from triptych import backends"),
    (rooms_import_downwards, "core/data/x.py", "from triptych.core.runs import log"),
    (rooms_import_downwards, "core/x.py", "import numpy"),
    (backends_do_not_meet, "backends/torch/x.py", "from ..oneflow import engine"),
    (backends_do_not_meet, "backends/torch/x.py", "from triptych.backends.paddle.ops import f"),
    (backends_do_not_meet, "backends/paddle/x.py", "import torch"),
    (backends_do_not_meet, "backends/__init__.py", "import oneflow"),
    (tools_import_core_only, "tools/x.py", "from triptych.backends import load"),
    (tools_import_core_only, "tools/x.py", "import numpy"),
    (no_assert_outside_tests, "core/x.py", "def f(x):\n    assert x"),
    (no_broad_except, "core/x.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (no_broad_except, "tests/x.py", "try:\n    f()\nexcept:\n    pass"),
    (functions_are_short, "core/x.py", "def f():\n" + "    x = 1\n" * 59),
    (files_are_short, "core/x.py", "x = 1\n" * 400),
    (public_functions_are_described, "core/x.py", "def f(x: int) -> int:\n    return x"),
    (public_functions_are_described, "core/x.py", 'def f(x) -> int:\n    """Yes."""'),
    (public_functions_are_described, "core/x.py", 'class C:\n    def f(self):\n        """Yes."""'),
]


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file of the house, read once for all rules."""
    return ast.parse((ROOT / path).read_text())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    broken = [f"{path}: {problem}" for path in FILES for problem in rule(path, parsed(path))]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_rule_sees_what_breaks_it(rule, path, source):
    assert list(rule(Path(path), ast.parse(source)))


def test_rules_cover_the_sources():
    assert {path.parts[0] for path in FILES} >= {"core", "backends", "tools", "tests"}
    assert {rule for rule, *_ in BROKEN} == set(RULES)


def test_packages_are_listed():
    """A forgotten sub-package works from a checkout and is missing from the wheel."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    on_disk = {
        ".".join(("triptych", *path.parent.parts)) for path in FILES if path.name == "__init__.py"
    }
    assert set(listed) == on_disk | {"triptych.configs"}
    assert len(listed) == len(set(listed))


def test_type_checkers_see_the_packages():
    for name in ("core", "backends", "configs"):
        assert (ROOT / "typings" / "triptych" / name).resolve() == ROOT / name


def test_no_file_shadows_a_module():
    """A folder or script run by path comes first on sys.path and hides the module of its name."""
    names = set.union(*FRAMEWORKS.values()) | {"numpy", "core", "backends"}
    tests = {path.stem for path in (ROOT / "tests").iterdir()}
    assert not tests & (names | sys.stdlib_module_names)
    tools = {path.stem for path in (ROOT / "tools").iterdir()}
    assert not tools & (names | sys.stdlib_module_names)


def surface(backend: str) -> dict[str, list[str]]:
    """File -> public names in the order of their definition."""
    folder = Path("backends", backend)
    return {
        str(path.relative_to(folder)): [
            node.name
            for node in parsed(path).body
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        ]
        for path in FILES
        if path.is_relative_to(folder)
    }


ALONE = {
    "plain/moca.py": "the plain MOCA loop in PyTorch that the benchmark compares with",
    "plain/reading.py": "what the benchmark of conversions compares reading with",
    "plain/loader.py": "the usual PyTorch loader that the benchmark compares with",
    "pipeline.py": "how a built model gets its stage, and how stages exchange, on each framework",
    "owned.py": "the tensors that one copy of the model updates for all copies",
    "sharded.py": "how a built model gets its part of the tensors on each framework",
    "parallel.py": "how processes find each other and exchange tensors on each framework",
    "layers.py": "exact and fast forms of what is slow or wrong; PyTorch's own layers need none",
    "products.py": "matrix products of float32 in NumPy, which has faster kernels than OneFlow",
    "norms.py": "the operations of norms that are slow or wrong in OneFlow",
    "fused.py": "a transformer block as one operation in NumPy, since OneFlow's waits take long",
    "residual.py": "a residual network as one operation in NumPy, likewise",
    "channels.py": "batch norm in NumPy, which is faster than OneFlow's operations",
    "maps.py": "layers of maps with channels last, which are fast on PyTorch's and OneFlow's CPU",
    "threads.py": "NumPy's loops on several cores, since OneFlow computes in one thread",
    "sums.py": "sums in the forms that are fast on OneFlow's CPU",
    "gpu.py": "what the check of a GPU measures; it measures PyTorch alone",
    "plain/device.py": "the plain loops of the check of a GPU, which measures PyTorch alone",
    "kernels.py": "operations that are faster than those that a framework would take",
    "mixed.py": "operations beside networks of 16 bits, which PyTorch alone has",
    "link.py": "how processes wait for each other on Paddle, whose gloo gives up after 30 seconds",
    "runtime.py": "what has to happen before these frameworks are imported",
    "export.py": "uses the exporter of PyTorch or Paddle; that of OneFlow fails",
    "flat.py": "packs tensors into one buffer; PyTorch's operations on lists of tensors need none",
}
"""Files that a backend may have for itself, and why."""
FROM_TIMM = ["Attention", "Mlp", "Block"]
"""Parts of the vision transformer that PyTorch's users know from timm, and that others define."""


def mirrored(backend: str) -> dict[str, list[str]]:
    """The part of ``surface`` that is the same in every backend."""
    found = {file: names for file, names in surface(backend).items() if file not in ALONE}
    return {file: [n for n in names if n not in FROM_TIMM] for file, names in found.items()}


@pytest.mark.parametrize("other", backends.BACKENDS[1:])
def test_backends_mirror_each_other(other):
    """Who knows one backend finds their way in the others: same files, same names, same order."""
    assert tuple(FRAMEWORKS) == backends.BACKENDS
    first, second = mirrored(backends.BACKENDS[0]), mirrored(other)
    assert second.keys() == first.keys()
    for file, names in first.items():
        assert second[file] == names, f"backends/{other}/{file}"
    assert {"ops.py", "vit.py", "heads.py", "optim.py", "engine.py", "state.py"} < first.keys()


def test_files_of_one_backend_are_still_there():
    assert set(ALONE) <= {file for backend in backends.BACKENDS for file in surface(backend)}
