"""Speed of the data pipeline beside PyTorch's DataLoader with torchvision or Albumentations.

Both loaders make two augmented views of JPEG files by the same transforms. They take turns in one
run with the same files, batch size and number of workers, so that other work of the machine slows
both. Only their ratio can be compared between machines.
"""

import argparse
import importlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image
from threadpoolctl import threadpool_limits

from triptych import backends
from triptych.core import config
from triptych.core.benchmarks import conditions
from triptych.core.config.spec import RunSpec
from triptych.core.data import Pipeline, compiled, open_train
from triptych.core.errors import UserError
from triptych.core.machine.environment import cores
from triptych.core.random import stream

FILES = 256
SIDES = (224, 500)
"""Shortest and longest side of a photograph, pixels."""
QUALITY = 90

PEERS = {"pillow": "torchvision", "opencv": "albumentations"}
"""Engine -> the loader beside it."""
_PACKAGES = {"torchvision": (), "albumentations": ("albumentations", "simplejpeg")}
VERSIONS = {
    "pillow": ("pillow", "numba", "torch", "torchvision"),
    "opencv": ("opencv-python-headless", "torch", "albumentations", "simplejpeg"),
}
"""Engine -> the packages whose versions the figures depend on."""

Loader = Callable[[RunSpec, int], Generator[Any, None, None]]
"""(spec, number of batches) -> batches."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``bench loader``."""
    parser.add_argument("-c", "--config", default="moco_v3/vit_small", metavar="FILE")
    parser.add_argument(
        "--engine",
        choices=tuple(PEERS),
        default="pillow",
        help="pillow beside torchvision, or opencv beside Albumentations with simplejpeg",
    )
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help="default: cores")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images per batch")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="timed per round")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each loader")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> int:
    """Prints the comparison."""
    for name, least in (("workers", 0), ("batch", 2), ("images", 1), ("rounds", 1)):
        if getattr(arguments, name) < least:
            raise UserError(f"--{name} {getattr(arguments, name)}: expected at least {least}")
    if arguments.batch > FILES:
        raise UserError(f"--batch {arguments.batch}: expected at most {FILES}")
    result = measure(
        arguments.config,
        arguments.workers,
        arguments.batch,
        arguments.images,
        arguments.rounds,
        arguments.engine,
    )
    print(json.dumps(result, indent=2) if arguments.json else _table(result))
    return 0


def measure(
    recipe: str, workers: int, batch: int, images: int, rounds: int, engine: str = "pillow"
) -> dict[str, Any]:
    """Images per second of both loaders, and their ratio.

    Args:
        recipe: gives the views and the image size.
        workers: worker processes; 0: this process loads.
        batch: images per batch.
        images: least number of timed images in each round; images loaded ahead are not timed.
        rounds: number of rounds; each loader is timed once in a round.
        engine: see ``augment.engine``.

    Raises:
        UserError: a package of the peer is missing.
    """
    peer = PEERS[engine]
    loaders = {"triptych": ours, peer: _theirs(peer)}
    compile_loops()
    with tempfile.TemporaryDirectory(prefix="triptych-bench-") as folder:
        size = write_photographs(Path(folder, "photographs"))
        spec = spec_of(recipe, folder, workers, batch, f"augment.engine={engine}")
        speeds: dict[str, list[float]] = {name: [] for name in loaders}
        with threadpool_limits(1):  # PyTorch gives its worker processes one thread as well
            for turn in range(rounds):
                # The order is reversed in every second round.
                for name in sorted(loaders, reverse=bool(turn % 2)):
                    speeds[name].append(speed(loaders[name], spec, -(-images // batch)))
    busy = max(1, min(workers, cores()))
    pairs = zip(speeds["triptych"], speeds[peer], strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    return {
        "workers": workers,
        "cores": busy,
        "batch": batch,
        "image_size": list(spec.model.size),
        "file_kib": size / FILES / 1024,
        "images_per_second_per_core": {
            name: statistics.median(values) / busy for name, values in speeds.items()
        },
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        **conditions.conditions(rounds, 1, VERSIONS[engine]),
    }


def spec_of(recipe: str, folder: str, workers: int, batch: int, *overrides: str) -> RunSpec:
    """A recipe that loads the images of the folders in ``folder``."""
    own = [f"data.root={folder}", f"data.workers={workers}", f"train.batch_size={batch}"]
    own += ["data.name=image_folder", "data.eval_root=null"]
    return config.load(recipe, [*own, *overrides])


def write_photographs(folder: Path) -> int:
    """Parts of scikit-learn's two photographs as JPEG files; returns their size in bytes."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    folder.mkdir()
    size = 0
    for number in range(FILES):
        photograph, rng = photographs[number % 2], stream(0, "bench/loader", number)
        width, height = (
            int(rng.integers(SIDES[0], min(SIDES[1], whole), endpoint=True))
            for whole in photograph.size
        )
        left = int(rng.integers(photograph.width - width, endpoint=True))
        top = int(rng.integers(photograph.height - height, endpoint=True))
        path = folder / f"{number:04}.jpg"
        photograph.crop((left, top, left + width, top + height)).save(path, quality=QUALITY)
        size += path.stat().st_size
    return size


def ours(spec: RunSpec, batches: int) -> Generator[Any, None, None]:
    """So many batches of our pipeline."""
    with Pipeline(spec, open_train(spec)) as pipeline:
        yield from pipeline.batches(0, batches)


def _theirs(peer: str) -> Loader:
    package = backends.load("torch")
    try:
        module = importlib.import_module(f"{package.__name__}.plain.loader")
        for name in _PACKAGES[peer]:
            importlib.import_module(name)
    except ImportError as error:
        missing = " ".join(_PACKAGES[peer]) or "'triptych[torch]'"
        raise UserError(f"bench loader: {error}; run: pip install {missing}") from error
    loader: Loader = module.albumentations_batches if _PACKAGES[peer] else module.batches
    return loader


def compile_loops() -> None:
    """Compiles the loops before the clock runs, as a long run does in its first minute."""
    if compiled.available():
        compiled.builder().wait()


def speed(loader: Loader, spec: RunSpec, batches: int) -> float:
    """Images per second, after the batches that were loaded ahead during start-up."""
    ahead = spec.data.workers * spec.data.prefetch + 1
    # The further batches at the end keep the workers busy until the last timed batch.
    with closing(loader(spec, ahead + batches + ahead)) as loaded:
        for _ in range(ahead):
            next(loaded)
        start = time.perf_counter()
        for _ in range(batches):
            next(loaded)
        return batches * spec.train.batch_size / (time.perf_counter() - start)


def _table(result: dict[str, Any]) -> str:
    height, width = result["image_size"]
    workers = conditions.counted(result["workers"], "worker")
    lines = [
        f"two views {height}x{width} from JPEG files of {result['file_kib']:.0f} KiB, batch "
        f"{result['batch']}, {workers} on {conditions.counted(result['cores'], 'core')}",
        conditions.line(result, of=" for each worker"),
        "loader        images/s per core",
    ]
    lines += [f"{n:12} {v:12.1f}" for n, v in result["images_per_second_per_core"].items()]
    spread = f"{min(result['ratios']):.2f} to {max(result['ratios']):.2f}"
    peer = list(result["images_per_second_per_core"])[1]
    lines.append(f"triptych / {peer}: {result['ratio']:.2f} (rounds: {spread})")
    return "\n".join(lines)
