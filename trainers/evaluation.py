"""Accuracy after each task, class-incremental and task-incremental, and what one reads off the matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from trainers.guards import isolated
from trainers.stream import Transform, to_unit

if TYPE_CHECKING:
    from trainers.datasets import DatasetSpec, Split

BATCH = 256


class Accuracies(NamedTuple):
    """Percent correct on each task seen so far."""

    class_il: list[float]  # among all classes seen
    task_il: list[float]  # among the classes of the sample's own task


def evaluate(network: nn.Module, test: Split, spec: DatasetSpec, task: int, transform: Transform) -> Accuracies:
    """Accuracies on the test sets of tasks 0 to `task`; a sample whose logits are not finite counts as wrong."""
    tasks = spec.task_of(test.labels)
    class_il, task_il = [], []
    with isolated(network):
        for seen in range(task + 1):
            members = tasks == seen
            logits = predict(network, test.images[members], transform)
            labels = test.labels[members]
            own = range(seen * spec.classes_per_task, (seen + 1) * spec.classes_per_task)
            class_il.append(percent_correct(logits, labels, range((task + 1) * spec.classes_per_task)))
            task_il.append(percent_correct(logits, labels, own))
    return Accuracies(class_il, task_il)


def predict(network: nn.Module, images: Tensor, transform: Transform) -> Tensor:
    """Logits of images."""
    return torch.cat([network(transform.normalise(to_unit(part))) for part in torch.split(images, BATCH)])


def percent_correct(logits: Tensor, labels: Tensor, classes: range) -> float:
    """How often the largest logit among `classes` is the label's."""
    among = logits[:, classes.start : classes.stop]
    correct = (among.argmax(1) + classes.start == labels) & among.isfinite().all(1)
    return 100 * float(correct.double().mean())


def mean(values: list[float]) -> float:
    """Average over tasks."""
    return sum(values) / len(values)


def forgetting(matrix: list[list[float]]) -> float:
    """Mean over earlier tasks of (best accuracy ever minus last); `matrix[i][j]` is task j after task i."""
    last = matrix[-1]
    drops = [max(row[task] for row in matrix[task:-1]) - last[task] for task in range(len(last) - 1)]
    return mean(drops) if drops else 0.0


def backward_transfer(matrix: list[list[float]]) -> float:
    """Mean over earlier tasks of (last accuracy minus the one right after learning it)."""
    last = matrix[-1]
    gains = [last[task] - matrix[task][task] for task in range(len(last) - 1)]
    return mean(gains) if gains else 0.0
