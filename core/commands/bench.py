"""``bench``: measures Triptych and an alternative side by side and prints their ratio."""

import argparse
import importlib
from types import ModuleType

from triptych.core.launch import refuse_launchers

BENCHMARKS = {
    "step": "a training step beside a plain loop of the same computation",
    "eval": "nearest neighbours and feature extraction beside scikit-learn and a plain loop",
    "convert": "conversion of a large training state beside cp, and reading beside PyTorch",
    "parallel": "a training step in several processes beside one process",
    "scaling": "memory, traffic and time of MoCo v3 on many cards, counted and not measured",
    "speed": "all of these that measure time, as the page docs/speed.md",
    "gpu": "a GPU: numbers, determinism, waits, copies and speed, each with a bar",
    "pixels": "augmentation by OpenCV beside Pillow: how far each operation is off",
    "loader": "two views of JPEG files beside torchvision's DataLoader",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each benchmark."""
    choices = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, text in BENCHMARKS.items():
        _benchmark(name).add_arguments(choices.add_parser(name, help=text, description=text))


def run(arguments: argparse.Namespace) -> int:
    """Prints the comparison; raises the errors of the chosen benchmark."""
    if not getattr(arguments, "launched", None):
        refuse_launchers()
    return int(_benchmark(arguments.benchmark).run(arguments))


def _benchmark(name: str) -> ModuleType:
    return importlib.import_module(f"triptych.core.benchmarks.{name}")
