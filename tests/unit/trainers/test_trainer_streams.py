import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stabilitykit.errors import UsageError
from trainers import datasets
from trainers.datasets import IDX, SPECS, DatasetConfig, Split, load
from trainers.seeding import generator
from trainers.stream import Stream, TaskSplit, Transform, permuted, rotated


def write_idx(folder: Path, count: int, *, zipped: bool = False) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for name in IDX:
        array = images if "images" in name else labels
        data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
        (folder / (name + ".gz" if zipped else name)).write_bytes(gzip.compress(data) if zipped else data)
    return images


def make_stream(name: str, folder: Path, *, joint_tasks: int = 0) -> Stream:
    config = DatasetConfig(name=name, base_path=folder)
    train, _ = load(config)
    return Stream(
        TaskSplit(train, config.spec, 0),
        batch_size=8,
        drop_last=False,
        transform=Transform(config.spec, generator(0, "augmentation")),
        order=generator(0, "order"),
        joint_tasks=joint_tasks,
    )


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("where", ["", "MNIST/raw"])
def test_idx_files_are_read_from_the_base_path_or_torchvisions_folder(tmp_path: Path, zipped: bool, where: str) -> None:
    images = write_idx(tmp_path / where, 30, zipped=zipped)

    train, test = load(DatasetConfig(name="seq-mnist", base_path=tmp_path))

    assert np.array_equal(train.images[:, 0].numpy(), images)
    assert test.labels.tolist() == [number % 10 for number in range(30)]


def test_fashion_mnist_is_taken_from_debians_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "debian", 20, zipped=True)
    monkeypatch.setattr(datasets, "DEBIAN", {"FashionMNIST": tmp_path / "debian"})

    train, _ = load(DatasetConfig(name="seq-fmnist", base_path=tmp_path))

    assert len(train.labels) == 20


@pytest.mark.parametrize("damage", [b"", b"\0\0\x08\x03", b"\0\0\x08\x01\0\0\0\x05abc"])
def test_a_damaged_idx_file_is_named(tmp_path: Path, damage: bytes) -> None:
    write_idx(tmp_path, 20)
    (tmp_path / IDX[0]).write_bytes(damage)

    with pytest.raises(UsageError, match=f"{IDX[0]}: got .*, expected an idx file"):
        load(DatasetConfig(name="seq-mnist", base_path=tmp_path))


@pytest.mark.parametrize(("num_tasks", "classes"), [(5, 20), (10, 10), (20, 5)])
def test_cifar100_comes_in_five_ten_or_twenty_tasks(num_tasks: int, classes: int) -> None:
    spec = DatasetConfig(name="seq-cifar100", num_tasks=num_tasks).spec

    assert (spec.num_tasks, spec.classes_per_task, spec.num_classes) == (num_tasks, classes, 100)
    assert spec.classes_of(num_tasks - 1) == range(100 - classes, 100)


def test_a_number_of_tasks_that_does_not_divide_the_classes_is_refused() -> None:
    with pytest.raises(UsageError, match="--num_tasks: got 3, expected a divisor of the 10 classes of seq-mnist"):
        DatasetConfig(name="seq-mnist", num_tasks=3)


@pytest.mark.parametrize("name", ["perm-mnist", "rot-mnist"])
def test_a_domain_stream_has_every_image_and_class_in_every_one_of_its_twenty_tasks(tmp_path: Path, name: str) -> None:
    write_idx(tmp_path, 30)
    stream = make_stream(name, tmp_path)

    first, last = (list(stream.batches(task, 0)) for task in (0, 19))

    assert SPECS[name].num_tasks == 20
    assert len(torch.cat([batch.indices for batch in first]).unique()) == 30
    assert set(torch.cat([batch.labels for batch in last]).tolist()) == set(range(10))


@pytest.mark.parametrize("name", ["perm-mnist", "rot-mnist"])
def test_a_domain_is_fixed_by_seed_and_task_and_test_images_share_it(tmp_path: Path, name: str) -> None:
    write_idx(tmp_path, 30)
    train, test = load(DatasetConfig(name=name, base_path=tmp_path))
    rows = torch.arange(5)
    spec = SPECS[name]

    seen = TaskSplit(train, spec, 0).examples(rows, 3)

    assert torch.equal(seen, TaskSplit(test, spec, 0).examples(rows, 3))
    assert not torch.equal(seen, TaskSplit(train, spec, 0).examples(rows, 4))
    assert not torch.equal(seen, TaskSplit(train, spec, 1).examples(rows, 3))


def test_a_permutation_moves_the_pixels_of_all_images_alike() -> None:
    images = torch.rand(3, 1, 4, 4)
    images[1] = images[0]

    moved = permuted(images, generator(0, "p"))

    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved.flatten(1).sort().values, images.flatten(1).sort().values)


@pytest.mark.parametrize(("degrees", "quarters"), [(90.0, 1), (180.0, 2)])
def test_quarter_turns_are_exact_and_counter_clockwise(degrees: float, quarters: int) -> None:
    images = torch.rand(2, 1, 28, 28)

    assert torch.equal(rotated(images, degrees), torch.rot90(images, quarters, dims=(2, 3)))


def test_a_joint_session_brings_all_tasks_shuffled_together(tmp_path: Path) -> None:
    write_idx(tmp_path, 100)
    stream = make_stream("seq-mnist", tmp_path, joint_tasks=4)

    batches = list(stream.batches(0, 0))

    assert stream.num_batches(0) == len(batches) == 10
    assert set(torch.cat([batch.labels for batch in batches]).tolist()) == set(range(8))
    assert len(set(batches[0].labels.tolist())) > 2


def test_a_joint_session_over_domains_shows_each_image_as_its_task_has_it(tmp_path: Path) -> None:
    write_idx(tmp_path, 10)
    stream = make_stream("perm-mnist", tmp_path, joint_tasks=2)

    batches = list(stream.batches(0, 0))

    images = torch.cat([batch.examples for batch in batches])
    indices = torch.cat([batch.indices for batch in batches])
    both = torch.stack([stream.train.examples(torch.arange(10), task) for task in (0, 1)])
    for index in range(10):
        pair = images[indices == index]
        assert {tuple(image.flatten().tolist()) for image in pair} == {
            tuple(both[task, index].flatten().tolist()) for task in (0, 1)
        }


def test_an_epoch_can_be_entered_at_any_batch(tmp_path: Path) -> None:
    write_idx(tmp_path, 100)
    whole, part = (make_stream("seq-mnist", tmp_path) for _ in range(2))

    expected = list(whole.batches(1, 0))[2:]
    found = list(part.batches(1, 0, skip=2))

    assert len(expected) == len(found) == 1
    assert torch.equal(expected[0].indices, found[0].indices)


def test_validation_holds_out_a_share_of_every_class_and_touches_no_test_image() -> None:
    train, held = load(DatasetConfig(validation=10))
    whole, _ = load(DatasetConfig())

    assert torch.bincount(held.labels).tolist() == [50] * 10
    assert torch.bincount(train.labels).tolist() == [450] * 10
    joined = torch.cat([train.images, held.images]).flatten(1).double().sum(1).sort().values
    assert torch.equal(joined, whole.images.flatten(1).double().sum(1).sort().values)


def test_permuted_classes_are_the_same_images_under_other_numbers() -> None:
    plain, shuffled = (load(DatasetConfig(permute_classes=chosen), seed=1)[0] for chosen in (False, True))

    pairs = set(zip(plain.labels.tolist(), shuffled.labels.tolist(), strict=True))

    assert torch.equal(plain.images, shuffled.images)
    assert len(pairs) == len({new for _, new in pairs}) == 10
    assert any(old != new for old, new in pairs)


@pytest.mark.parametrize("options", [{"validation": 100.0}, {"validation": math.nan}, {"num_tasks": -1}])
def test_impossible_options_name_their_flag(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"^--\w+: got .*, expected "):
        DatasetConfig(**options)


def test_a_split_knows_its_tasks_by_class() -> None:
    labels = torch.tensor([0, 1, 2, 3, 2])
    split = Split(images=torch.zeros(5, 1, 28, 28, dtype=torch.uint8), labels=labels)

    assert TaskSplit(split, SPECS["seq-mnist"], 0).members(1).tolist() == [2, 3, 4]
