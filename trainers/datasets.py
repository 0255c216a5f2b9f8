"""Datasets by name, whole in memory as uint8: Split Fashion-MNIST mini is embedded, the others are read from files."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from stabilitykit.errors import UsageError
from trainers.seeding import generator

FMNIST_MINI = Path(__file__).parent / "data" / "fmnist_mini.npz"
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
DEBIAN = {"FashionMNIST": Path("/usr/share/datasets/fashion-mnist")}  # of the package dataset-fashion-mnist
Domain = Literal["", "permutation", "rotation"]


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
        domain: how tasks differ when they all have the same classes (domain-incremental); empty when each brings its
            own (class-incremental).
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
    domain: Domain = ""

    @property
    def num_classes(self) -> int:
        """Classes over all tasks: the width of the head."""
        return self.classes_per_task if self.domain else self.num_tasks * self.classes_per_task

    def classes_of(self, task: int) -> range:
        """The classes of `task`: they arrive in order, or are the same in every task."""
        first = 0 if self.domain else task * self.classes_per_task
        return range(first, first + self.classes_per_task)

    def divided(self, num_tasks: int) -> DatasetSpec:
        """The same data in another number of tasks.

        Raises:
            UsageError: the classes cannot be shared out evenly.
        """
        if self.domain:
            return replace(self, num_tasks=num_tasks)
        if num_tasks < 1 or self.num_classes % num_tasks:
            raise UsageError(
                f"--num_tasks: got {num_tasks}, expected a divisor of the {self.num_classes} classes of {self.name}"
            )
        return replace(self, num_tasks=num_tasks, classes_per_task=self.num_classes // num_tasks)


GREY, COLOUR = (1, 28, 28), (3, 32, 32)
SPECS: Mapping[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(name="seq-fmnist-mini", source=FMNIST_MINI, num_tasks=5, classes_per_task=2, shape=GREY),
        DatasetSpec(name="seq-fmnist", source="FashionMNIST", num_tasks=5, classes_per_task=2, shape=GREY),
        DatasetSpec(name="seq-mnist", source="MNIST", num_tasks=5, classes_per_task=2, shape=GREY),
        DatasetSpec(
            name="perm-mnist", source="MNIST", num_tasks=20, classes_per_task=10, shape=GREY, domain="permutation"
        ),
        DatasetSpec(name="rot-mnist", source="MNIST", num_tasks=20, classes_per_task=10, shape=GREY, domain="rotation"),
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
    """Which dataset, where its files are, and how it is divided.

    Attributes:
        name: one of SPECS.
        base_path: folder of the files that are not embedded.
        download: let torchvision fetch what is missing.
        num_tasks: divide the classes into so many tasks; 0 for the dataset's own number.
        permute_classes: let the seed decide the order in which classes arrive.
        validation: hold out this percentage of every class's training images and test on them, to choose
            hyper-parameters without a look at the test set; 0 for the real test set.
    """

    name: str = "seq-fmnist-mini"
    base_path: Path = Path("data")
    download: bool = False
    num_tasks: int = 0
    permute_classes: bool = False
    validation: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SPECS:
            raise UsageError(f"--dataset: got {self.name!r}, expected one of {', '.join(SPECS)}")
        if not 0 <= self.validation < 100:
            raise UsageError(f"--validation: got {self.validation}, expected a percentage, 0 or more and below 100")
        if self.num_tasks < 0:
            raise UsageError(f"--num_tasks: got {self.num_tasks}, expected 0 (the dataset's own) or more")
        _ = self.spec  # refuses a number of tasks that does not divide the classes

    @property
    def spec(self) -> DatasetSpec:
        """What the named dataset is."""
        spec = SPECS[self.name]
        return spec.divided(self.num_tasks) if self.num_tasks else spec


def load(config: DatasetConfig, seed: int = 0) -> tuple[Split, Split]:
    """Training and test split, checked; `seed` decides what is held out and in which order classes arrive.

    Raises:
        UsageError: the files are missing or hold something else.
    """
    spec = config.spec
    train_images, train_labels, test_images, test_labels = _arrays(config)
    train = _split(spec, "train", train_images, train_labels)
    test = _split(spec, "test", test_images, test_labels)
    if config.validation:
        train, test = held_out(train, config.validation, generator(seed, "validation"))
    if config.permute_classes:
        order = torch.randperm(spec.num_classes, generator=generator(seed, "class order"))
        train, test = (replace(split, labels=order[split.labels]) for split in (train, test))
    return train, test


def held_out(train: Split, percent: float, draws: torch.Generator) -> tuple[Split, Split]:
    """The training split without `percent` of every class, and those."""
    chosen = torch.zeros(len(train.labels), dtype=torch.bool)
    for label in range(int(train.labels.max()) + 1):
        members = (train.labels == label).nonzero().flatten()
        count = max(1, round(len(members) * percent / 100))
        chosen[members[torch.randperm(len(members), generator=draws)[:count]]] = True
    kept, held = (Split(images=train.images[rows], labels=train.labels[rows]) for rows in (~chosen, chosen))
    return kept, held


def _arrays(config: DatasetConfig) -> list[Any]:
    """The four arrays, from an archive, from idx files or through torchvision, whichever is there."""
    source = config.spec.source
    archive = source if isinstance(source, Path) else config.base_path / config.spec.archive
    if archive.is_file():
        return _from_archive(archive)
    folders = [config.base_path, config.base_path / str(source) / "raw", *filter(None, [DEBIAN.get(str(source))])]
    for folder in folders if config.spec.shape == GREY else []:
        if paths := _idx_files(folder):
            return [_from_idx(path) for path in paths]
    return _from_torchvision(config)


def _idx_files(folder: Path) -> list[Path]:
    """The four idx files of MNIST and its relatives in `folder`, zipped or not; none if one is missing."""
    found = [[path for path in (folder / name, folder / f"{name}.gz") if path.is_file()] for name in IDX]
    return [paths[0] for paths in found] if all(found) else []


def _from_idx(path: Path) -> Any:
    """An array of bytes as LeCun's idx format holds it: two zeros, type 8, rank, big-endian sizes, the bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rank = data[3]
        sizes = np.frombuffer(data, ">u4", rank, 4).astype(int)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(sizes).copy()
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise UsageError(f"{path}: got {error}, expected an idx file of bytes; put it back") from error


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
