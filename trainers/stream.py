"""The stream of tasks: which images belong to a task, in which order they come, how they are augmented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainers.batch import Batch

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
        self.mean = torch.tensor(spec.mean or (0.0,)).reshape(1, -1, 1, 1)
        self.std = torch.tensor(spec.std or (1.0,)).reshape(1, -1, 1, 1)

    def __call__(self, examples: Tensor) -> Tensor:
        """Augmented and normalised copies of images in [0, 1]."""
        return self.normalise(self.flip(self.crop(examples)) if self.padding else examples)

    def normalise(self, examples: Tensor) -> Tensor:
        """Normalised images, no augmentation: what evaluation sees."""
        return (examples - self.mean) / self.std

    def crop(self, examples: Tensor) -> Tensor:
        """One random window of the zero-padded image each."""
        count, channels, height, width = examples.shape
        padded = torch.nn.functional.pad(examples, [self.padding] * 4)
        top, left = torch.randint(2 * self.padding + 1, (2, count, 1), generator=self.generator)
        rows = (top + torch.arange(height))[:, None, :, None]
        columns = (left + torch.arange(width))[:, None, None, :]
        sample = torch.arange(count)[:, None, None, None]
        return padded[sample, torch.arange(channels)[:, None, None], rows, columns]

    def flip(self, examples: Tensor) -> Tensor:
        """Mirrored left to right, each with probability one half."""
        mirrored = torch.rand(len(examples), 1, 1, 1, generator=self.generator) < 0.5
        return torch.where(mirrored, examples.flip(-1), examples)

    def state_dict(self) -> dict[str, Tensor]:
        """The augmentation generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put the generator back."""
        self.generator.set_state(state["generator"])


def to_unit(images: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return images.float() / 255


class Stream:
    """The training set, task by task."""

    def __init__(
        self,
        train: Split,
        spec: DatasetSpec,
        *,
        batch_size: int,
        drop_last: bool,
        transform: Transform,
        order: torch.Generator,
    ) -> None:
        self.train = train
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.transform = transform
        self.order = order
        self.tasks = spec.task_of(train.labels)

    def num_batches(self, task: int) -> int:
        """Batches an epoch of `task` has."""
        count = int((self.tasks == task).sum())
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def batches(self, task: int, epoch: int) -> Iterator[Batch]:
        """One epoch of `task`, shuffled afresh."""
        members = (self.tasks == task).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=self.order)]
        for indices in torch.split(shuffled, self.batch_size)[: self.num_batches(task)]:
            examples = to_unit(self.train.images[indices])
            labels = self.train.labels[indices]
            yield Batch(self.transform(examples), labels, examples, indices, task, epoch)
