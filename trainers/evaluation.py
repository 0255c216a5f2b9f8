"""Accuracy after each task, class-incremental and task-incremental, and what one reads off the matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stabilitykit.guards import isolated
from trainers.stream import TaskSplit, Transform

BATCH = 256


class Accuracies(NamedTuple):
    """Percent correct, a number a task."""

    class_il: list[float]  # among all classes seen
    task_il: list[float]  # among the classes of the sample's own task


def evaluate(network: nn.Module, test: TaskSplit, transform: Transform, *, seen: int) -> Accuracies:
    """Accuracies on the test sets of tasks 0 to `seen`; a sample whose logits are not finite counts as wrong."""
    return _accuracies(network, test, transform, [(task, seen) for task in range(seen + 1)])


def evaluate_unseen(network: nn.Module, test: TaskSplit, transform: Transform, tasks: range) -> Accuracies:
    """Accuracies on tasks before they are learnt, each among the classes up to its own: what transfers forward."""
    return _accuracies(network, test, transform, [(task, task) for task in tasks])


def _accuracies(network: nn.Module, test: TaskSplit, transform: Transform, wanted: list[tuple[int, int]]) -> Accuracies:
    """For each (task, last seen task): accuracy among the classes seen, and among the task's own."""
    class_il, task_il = [], []
    with isolated(network):
        for task, seen in wanted:
            members = test.members(task)
            logits, labels = predict(network, test, transform, members, task), test.split.labels[members]
            class_il.append(percent_correct(logits, labels, range(test.spec.classes_of(seen).stop)))
            task_il.append(percent_correct(logits, labels, test.spec.classes_of(task)))
    return Accuracies(class_il, task_il)


def predict(network: nn.Module, test: TaskSplit, transform: Transform, members: Tensor, task: int) -> Tensor:
    """Logits of the given rows."""
    batches = (transform.normalise(test.examples(rows, task)) for rows in torch.split(members, BATCH))
    return torch.cat([network(batch) for batch in batches])


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
    drops = [max(row[task] for row in matrix[task:-1]) - last[task] for task in range(len(matrix) - 1)]
    return mean(drops) if drops else 0.0


def backward_transfer(matrix: list[list[float]]) -> float:
    """Mean over earlier tasks of (last accuracy minus the one right after learning it)."""
    last = matrix[-1]
    gains = [last[task] - matrix[task][task] for task in range(len(matrix) - 1)]
    return mean(gains) if gains else 0.0


def forward_transfer(before: list[float], untrained: list[float]) -> float:
    """Mean over later tasks of (accuracy just before learning it minus the untrained network's), task 1 first."""
    gains = [after - start for after, start in zip(before, untrained, strict=False)]
    return mean(gains) if gains else 0.0
