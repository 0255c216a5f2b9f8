"""Datasets by name, whole in memory as uint8: Split Fashion-MNIST mini is embedded, torchvision has the others."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitykit.errors import UsageError

FMNIST_MINI = Path(__file__).parent / "data" / "fmnist_mini.npz"
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images and their labels."""

    images: Tensor  # (N, C, H, W) uint8
    labels: Tensor  # (N,) int64


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What a dataset is, known before it is loaded.

    Attributes:
        source: class name in torchvision.datasets, or the path of an archive with ARRAYS.
        shape: (C, H, W) of one image.
        mean: per channel, in [0, 1]; empty for no normalisation.
        std: per channel.
        crop_padding: random crops after so much zero padding, and random flips; 0 for no augmentation.
        archive: name of an .npz in the base path that is taken in preference to torchvision.
    """

    name: str
    source: str | Path
    num_tasks: int
    classes_per_task: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop_padding: int = 0
    archive: str = ""

    @property
    def num_classes(self) -> int:
        """Classes over all tasks: the width of the head."""
        return self.num_tasks * self.classes_per_task

    def task_of(self, labels: Tensor) -> Tensor:
        """The task each label belongs to: classes arrive in order."""
        return labels // self.classes_per_task


GREY, COLOUR = (1, 28, 28), (3, 32, 32)
SPECS: Mapping[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(name="seq-fmnist-mini", source=FMNIST_MINI, num_tasks=5, classes_per_task=2, shape=GREY),
        DatasetSpec(name="seq-fmnist", source="FashionMNIST", num_tasks=5, classes_per_task=2, shape=GREY),
        DatasetSpec(name="seq-mnist", source="MNIST", num_tasks=5, classes_per_task=2, shape=GREY),
        DatasetSpec(
            name="seq-cifar10",
            source="CIFAR10",
            num_tasks=5,
            classes_per_task=2,
            shape=COLOUR,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2615),
            crop_padding=4,
        ),
        DatasetSpec(
            name="seq-cifar100",
            source="CIFAR100",
            num_tasks=10,
            classes_per_task=10,
            shape=COLOUR,
            mean=(0.5071, 0.4867, 0.4408),
            std=(0.2675, 0.2565, 0.2761),
            crop_padding=4,
            archive="cifar100.npz",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Which dataset, and where its files are."""

    name: str = "seq-fmnist-mini"
    base_path: Path = Path("data")
    download: bool = False

    def __post_init__(self) -> None:
        if self.name not in SPECS:
            raise UsageError(f"--dataset: got {self.name!r}, expected one of {', '.join(SPECS)}")

    @property
    def spec(self) -> DatasetSpec:
        """What the named dataset is."""
        return SPECS[self.name]


def load(config: DatasetConfig) -> tuple[Split, Split]:
    """Training and test split, checked.

    Raises:
        UsageError: the files are missing or hold something else.
    """
    spec = config.spec
    archive = spec.source if isinstance(spec.source, Path) else config.base_path / spec.archive
    arrays = _from_archive(archive) if archive.is_file() else _from_torchvision(config)
    train_images, train_labels, test_images, test_labels = arrays
    return _split(spec, "train", train_images, train_labels), _split(spec, "test", test_images, test_labels)


def _from_archive(path: Path) -> list[Any]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return [archive[name] for name in ARRAYS]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: got {error}, expected an .npz with {', '.join(ARRAYS)}; put it back") from error


def _from_torchvision(config: DatasetConfig) -> list[Any]:
    source = config.spec.source
    if isinstance(source, Path):
        raise UsageError(f"{source}: no such file, expected the embedded data; run make_fmnist_mini.py beside it")
    reader = _reader(source)
    try:
        pair = [reader(root=config.base_path, train=train, download=config.download) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # torchvision's word for files that are missing or damaged
        archive = f", or {config.spec.archive}" if config.spec.archive else ""
        raise UsageError(
            f"--base_path: no {source} under {config.base_path}, expected torchvision's files{archive}; "
            f"name their folder, or give --download 1"
        ) from error
    return [part for dataset in pair for part in (dataset.data, dataset.targets)]


def _reader(source: str) -> Callable[..., Any]:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UsageError(f"--dataset: {source} needs torchvision, which is missing; pip install torchvision") from error
    reader: Callable[..., Any] = getattr(datasets, source)
    return reader


def _split(spec: DatasetSpec, part: str, images: object, labels: object) -> Split:
    """Arrays as torchvision or an archive gives them, as a split; refused unless every shape and label fits."""
    pixels, targets = torch.as_tensor(images), torch.as_tensor(labels)
    channels, height, width = spec.shape
    expected = (height, width) if channels == 1 else (height, width, channels)
    if pixels.dtype != torch.uint8 or tuple(pixels.shape[1:]) != expected or len(pixels) != len(targets):
        raise UsageError(
            f"{spec.name}: got {part} images {pixels.dtype} {list(pixels.shape)} with {len(targets)} labels, "
            f"expected uint8 images {['N', *expected]} with N labels; rebuild the file"
        )
    if len(targets) == 0 or targets.min() < 0 or targets.max() >= spec.num_classes:
        spread = f"{targets.min()} to {targets.max()}" if len(targets) else "none"
        raise UsageError(
            f"{spec.name}: got {part} labels {spread}, expected 0 to {spec.num_classes - 1}; rebuild the file"
        )
    stacked = pixels[:, None] if channels == 1 else pixels.permute(0, 3, 1, 2)
    return Split(images=stacked.contiguous(), labels=targets.long())
