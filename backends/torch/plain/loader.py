"""Loaders as a careful user writes them, for comparison in ``bench loader``.

They use PyTorch's DataLoader with torchvision's transforms, or with Albumentations and simplejpeg,
and nothing of ``core.data``.
"""

import random
from collections.abc import Callable, Generator, Sequence
from typing import Any

from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from triptych.core.config import spec
from triptych.core.errors import UserError

Transform = Callable[[Any], Any]


def batches(run: spec.RunSpec, count: int) -> Generator[Any, None, None]:
    """``count`` batches of two views of the images below ``data.root``, in random order."""
    yield from _batches(run, count, ImageFolder(run.data.root, TwoViews(run)))


def albumentations_batches(run: spec.RunSpec, count: int) -> Generator[Any, None, None]:
    """``batches`` with Albumentations; JPEG files are read by simplejpeg."""
    import simplejpeg

    def read(path: str) -> Any:
        with open(path, "rb") as file:
            return simplejpeg.decode_jpeg(file.read())

    yield from _batches(run, count, ImageFolder(run.data.root, TwoArrays(run), loader=read))


def _batches(run: spec.RunSpec, count: int, dataset: ImageFolder) -> Generator[Any, None, None]:
    # The sampler is as long as the run, so that there is no pause between epochs.
    sampler = RandomSampler(dataset, num_samples=count * run.train.batch_size)
    yield from DataLoader(
        dataset,
        batch_size=run.train.batch_size,
        sampler=sampler,
        num_workers=run.data.workers,
        prefetch_factor=run.data.prefetch if run.data.workers else None,
    )


class TwoViews:
    """Both views of one image."""

    def __init__(self, run: spec.RunSpec) -> None:
        self.views = [_compose(ops, run) for ops in (run.augment.view1, run.augment.view2)]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """Two tensors (C, H, W)."""
        return [view(image) for view in self.views]


class TwoArrays:
    """Both views of one image in an array, by Albumentations."""

    def __init__(self, run: spec.RunSpec) -> None:
        import albumentations
        from albumentations.pytorch import ToTensorV2

        augment = run.augment
        last = [albumentations.Normalize(augment.mean, augment.std), ToTensorV2()]
        self.views = [
            albumentations.Compose([*(_by_albumentations(op, run.model.size) for op in ops), *last])
            for ops in (augment.view1, augment.view2)
        ]

    def __call__(self, image: Any) -> list[Tensor]:
        """Two tensors (C, H, W)."""
        return [view(image=image)["image"] for view in self.views]


class Blur:
    """Gaussian blur of a random radius."""

    def __init__(self, sigma: tuple[float, float]) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """The blurred image."""
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def _compose(ops: Sequence[spec.Op], run: spec.RunSpec) -> Transform:
    steps = [_transform(op, run.model.size) for op in ops]
    last = [transforms.ToTensor(), transforms.Normalize(run.augment.mean, run.augment.std)]
    return transforms.Compose([*steps, *last])


def _transform(op: spec.Op, size: tuple[int, int]) -> Transform:
    if isinstance(op, spec.RandomResizedCrop):
        interpolation = InterpolationMode(op.interpolation)
        return transforms.RandomResizedCrop(size, op.scale, op.ratio, interpolation)
    if isinstance(op, spec.ColorJitter):
        jitter = transforms.ColorJitter(op.brightness, op.contrast, op.saturation, op.hue)
        return transforms.RandomApply([jitter], op.p)
    if isinstance(op, spec.Grayscale):
        return transforms.RandomGrayscale(op.p)
    if isinstance(op, spec.GaussianBlur):
        return transforms.RandomApply([Blur(op.sigma)], op.p)
    if isinstance(op, spec.Solarize):
        return transforms.RandomSolarize(op.threshold, op.p)
    if isinstance(op, spec.HorizontalFlip):
        return transforms.RandomHorizontalFlip(op.p)
    raise UserError(f"bench loader: augment.{op.op} is not part of this comparison")


def _by_albumentations(op: spec.Op, size: tuple[int, int]) -> Any:
    import albumentations as package

    if isinstance(op, spec.RandomResizedCrop):
        return package.RandomResizedCrop(size=size, scale=op.scale, ratio=op.ratio)
    if isinstance(op, spec.ColorJitter):
        strengths = op.brightness, op.contrast, op.saturation, op.hue
        return package.ColorJitter(*strengths, p=op.p)
    if isinstance(op, spec.Grayscale):
        return package.ToGray(p=op.p)
    if isinstance(op, spec.GaussianBlur):
        return package.GaussianBlur(blur_limit=0, sigma_limit=op.sigma, p=op.p)
    if isinstance(op, spec.Solarize):
        threshold = op.threshold / 255
        return package.Solarize(threshold_range=(threshold, threshold), p=op.p)
    if isinstance(op, spec.HorizontalFlip):
        return package.HorizontalFlip(p=op.p)
    raise UserError(f"bench loader: augment.{op.op} is not part of this comparison")
