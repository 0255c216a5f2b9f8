"""The stream of tasks: which images belong to a task, in which order they come, how they are augmented."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from trainers.batch import Batch
from trainers.seeding import generator

if TYPE_CHECKING:
    from trainers.datasets import DatasetSpec, Split


class Transform:
    """Random crop and flip where the dataset has them, then normalisation; on the stream and on replays alike.

    Whatever reaches the network is normalised: raw [0, 1] replays beside a normalised stream are two input
    distributions for one BatchNorm.
    """

    def __init__(self, spec: DatasetSpec, generator: torch.Generator) -> None:
        self.generator = generator
        self.padding = spec.crop_padding
        self.normalises = bool(spec.mean)
        self.mean = torch.tensor(spec.mean or (0.0,)).reshape(1, -1, 1, 1)
        self.std = torch.tensor(spec.std or (1.0,)).reshape(1, -1, 1, 1)
        self._padded = torch.empty(0)

    def __call__(self, examples: Tensor) -> Tensor:
        """Augmented and normalised copies of images in [0, 1]."""
        if not self.padding:
            return self.normalise(examples)
        augmented = self.crop(examples)  # a copy: what follows may write into it
        self.flip(augmented)
        return augmented.sub_(self.mean).div_(self.std) if self.normalises else augmented

    def normalise(self, examples: Tensor) -> Tensor:
        """Normalised images, no augmentation: what evaluation sees."""
        return (examples - self.mean) / self.std if self.normalises else examples

    def crop(self, examples: Tensor) -> Tensor:
        """One random window of the zero-padded image each."""
        height, width = examples.shape[2:]
        top, left = torch.randint(2 * self.padding + 1, (2, len(examples)), generator=self.generator).numpy()
        windows = (
            self.padded(examples).unfold(2, height, 1).unfold(3, width, 1).permute(0, 2, 3, 1, 4, 5)
        )  # a view: (N, 9, 9, C, H, W)
        # numpy copies whole rows here, torch one value at a time: a fifth of the time for 32 images of CIFAR.
        return torch.from_numpy(windows.numpy()[np.arange(len(examples)), top, left])

    def padded(self, examples: Tensor) -> Tensor:
        """The images within a border of zeros, in memory that the next call writes over."""
        count, channels, height, width = examples.shape
        shape = (count, channels, height + 2 * self.padding, width + 2 * self.padding)
        if self._padded.shape != shape:
            self._padded = examples.new_zeros(shape)
        inner = slice(self.padding, -self.padding)
        self._padded[:, :, inner, inner] = examples
        return self._padded

    def flip(self, examples: Tensor) -> None:
        """Mirror the images left to right in place, each with probability one half."""
        mirrored = torch.rand(len(examples), generator=self.generator).numpy() < 0.5
        images = examples.numpy()
        images[mirrored] = images[mirrored][..., ::-1]

    def state_dict(self) -> dict[str, Tensor]:
        """The augmentation generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put the generator back."""
        self.generator.set_state(state["generator"])


def to_unit(images: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return images / 255


class TaskSplit:
    """A split as its tasks see it: which images a task has, and what its domain makes of them."""

    def __init__(self, split: Split, spec: DatasetSpec, seed: int) -> None:
        self.split = split
        self.spec = spec
        self.seed = seed

    def members(self, task: int) -> Tensor:
        """Rows of the split that belong to `task`."""
        labels, classes = self.split.labels, self.spec.classes_of(task)
        return ((labels >= classes.start) & (labels < classes.stop)).nonzero().flatten()

    def examples(self, indices: Tensor, task: int) -> Tensor:
        """Images in [0, 1] as they are in `task`."""
        images = to_unit(self.split.images.index_select(0, indices))
        if self.spec.domain == "permutation":
            return permuted(images, generator(self.seed, f"permutation of task {task}"))
        if self.spec.domain == "rotation":
            return rotated(images, 180 * float(torch.rand(1, generator=generator(self.seed, f"angle of task {task}"))))
        return images


def permuted(images: Tensor, draws: torch.Generator) -> Tensor:
    """All images with their pixels in one other order."""
    order = torch.randperm(images[0].numel(), generator=draws)
    return images.flatten(1)[:, order].reshape(images.shape)


def rotated(images: Tensor, degrees: float) -> Tensor:
    """All images turned counter-clockwise about their centre, nearest pixel, zeros from outside."""
    angle = math.radians(degrees)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    where = affine_grid(matrix.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, where, mode="nearest", align_corners=False)


class Stream:
    """The training set, task by task; with `joint_tasks` that many tasks at once, as the upper bound has them.

    Attributes:
        order: draws an epoch's order when the epoch begins, and nothing else.
    """

    def __init__(
        self,
        train: TaskSplit,
        *,
        batch_size: int,
        drop_last: bool,
        transform: Transform,
        order: torch.Generator,
        joint_tasks: int = 0,
    ) -> None:
        self.train = train
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.transform = transform
        self.order = order
        self.joint_tasks = joint_tasks

    def tasks_of(self, session: int) -> range:
        """The tasks learnt in `session`: one, or all of them."""
        return range(self.joint_tasks) if self.joint_tasks else range(session, session + 1)

    def num_batches(self, session: int) -> int:
        """Batches an epoch of `session` has."""
        count = sum(len(self.train.members(task)) for task in self.tasks_of(session))
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def batches(self, session: int, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """One epoch of `session`, shuffled afresh, from batch `skip` on."""
        found = [(self.train.members(task), task) for task in self.tasks_of(session)]
        members = torch.cat([rows for rows, _ in found])
        owners = torch.cat([torch.full_like(rows, task) for rows, task in found])
        order = torch.randperm(len(members), generator=self.order)
        for rows in torch.split(order, self.batch_size)[skip : self.num_batches(session)]:
            indices = members.index_select(0, rows)
            examples = self.examples(indices, owners.index_select(0, rows))
            labels = self.train.split.labels.index_select(0, indices)
            yield Batch(self.transform(examples), labels, examples, indices, session, epoch)

    def examples(self, indices: Tensor, tasks: Tensor) -> Tensor:
        """Images in [0, 1], each as its task has it."""
        if not self.train.spec.domain or not self.joint_tasks:
            return self.train.examples(indices, int(tasks[0]))
        examples = torch.empty(len(indices), *self.train.spec.shape)
        for task in sorted(set(tasks.tolist())):
            examples[tasks == task] = self.train.examples(indices[tasks == task], task)
        return examples
