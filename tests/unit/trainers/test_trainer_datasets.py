import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stabilitykit.errors import UsageError
from trainers.datasets import FMNIST_MINI, SPECS, DatasetConfig, load
from trainers.seeding import generator
from trainers.stream import Stream, TaskSplit, Transform


def write_cifar100(folder: Path, **changes: np.ndarray) -> None:
    images = np.zeros((200, 32, 32, 3), np.uint8)
    labels = np.arange(200, dtype=np.uint8) % 100
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(folder / "cifar100.npz", **(arrays | changes))


def test_the_embedded_archive_is_the_one_that_was_made() -> None:
    digest, name = FMNIST_MINI.with_name("fmnist_mini.npz.sha256").read_text().split()

    assert name == FMNIST_MINI.name
    assert hashlib.sha256(FMNIST_MINI.read_bytes()).hexdigest() == digest


def test_fmnist_mini_has_500_and_100_images_of_each_of_ten_classes() -> None:
    train, test = load(DatasetConfig())

    assert tuple(train.images.shape) == (5000, 1, 28, 28)
    assert torch.bincount(train.labels).tolist() == [500] * 10
    assert torch.bincount(test.labels).tolist() == [100] * 10


def test_the_embedded_data_need_no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)

    load(DatasetConfig())


def test_without_torchvision_its_datasets_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)

    with pytest.raises(UsageError, match="pip install torchvision"):
        load(DatasetConfig(name="seq-mnist", base_path=tmp_path))


def test_a_cifar100_archive_in_the_base_path_is_taken(tmp_path: Path) -> None:
    write_cifar100(tmp_path)

    train, _ = load(DatasetConfig(name="seq-cifar100", base_path=tmp_path))

    assert tuple(train.images.shape) == (200, 3, 32, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((200, 28, 28), np.uint8)}, r"got train images .*28, 28.*expected uint8 images"),
        ({"test_labels": np.full(200, 100)}, r"got test labels 100 to 100, expected 0 to 99"),
        ({"train_labels": np.full(200, -1)}, r"got train labels -1 to -1, expected 0 to 99"),
        ({"train_labels": np.zeros(3)}, r"with 3 labels, expected"),
    ],
)
def test_an_archive_that_holds_something_else_is_refused(
    tmp_path: Path, changes: dict[str, np.ndarray], message: str
) -> None:
    write_cifar100(tmp_path, **changes)

    with pytest.raises(UsageError, match=message):
        load(DatasetConfig(name="seq-cifar100", base_path=tmp_path))


def test_a_task_brings_its_own_classes_each_image_once() -> None:
    spec = SPECS["seq-fmnist-mini"]
    train, _ = load(DatasetConfig())
    transform = Transform(spec, generator(0, "augmentation"))
    stream = Stream(
        TaskSplit(train, spec, 0), batch_size=32, drop_last=False, transform=transform, order=generator(0, "order")
    )

    batches = list(stream.batches(2, epoch=0))

    assert len(batches) == stream.num_batches(2) == 32
    assert set(torch.cat([batch.labels for batch in batches]).tolist()) == {4, 5}
    indices = torch.cat([batch.indices for batch in batches])
    assert len(indices.unique()) == len(indices) == 1000
    assert torch.equal(train.labels[batches[0].indices], batches[0].labels)


def test_a_crop_is_a_window_of_the_padded_image() -> None:
    transform = Transform(SPECS["seq-cifar10"], generator(3, "augmentation"))
    images = torch.rand(5, 3, 32, 32)
    padded = torch.nn.functional.pad(images, [4] * 4)

    cropped = transform.crop(images)

    windows = padded.unfold(2, 32, 1).unfold(3, 32, 1)  # (5, 3, 9, 9, 32, 32)
    for image in range(5):
        same = (windows[image] == cropped[image][:, None, None]).all(dim=(0, 3, 4))
        assert same.any()


def test_images_are_cropped_mirrored_and_normalised_as_one_by_one() -> None:
    spec = SPECS["seq-cifar100"]
    transform, draws = Transform(spec, generator(3, "augmentation")), generator(3, "augmentation")
    batches = [torch.rand(count, 3, 32, 32) for count in (6, 6, 2)]

    found = [transform(images) for images in batches]

    for images, actual in zip(batches, found, strict=True):
        top, left = torch.randint(9, (2, len(images)), generator=draws).tolist()
        mirrored = torch.rand(len(images), generator=draws) < 0.5
        padded = torch.nn.functional.pad(images, [4] * 4)
        for index in range(len(images)):
            window = padded[index, :, top[index] : top[index] + 32, left[index] : left[index] + 32]
            window = window.flip(-1) if mirrored[index] else window
            assert torch.equal(actual[index], transform.normalise(window[None])[0])
        assert actual.is_contiguous()


def test_replays_are_normalised_like_the_stream() -> None:
    spec = SPECS["seq-cifar100"]
    transform = Transform(spec, generator(0, "augmentation"))
    grey = torch.tensor(spec.mean).reshape(1, 3, 1, 1).expand(2, 3, 32, 32)

    assert transform.normalise(grey).abs().max() < 1e-6
