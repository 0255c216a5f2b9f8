"""The optimizer and its learning rate: a pure function of task and epoch (guard 1 applies it at every step)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from stabilitykit.errors import UsageError
from stabilitykit.guards import LearningRateSchedule, cosine_over_tasks, unchanged
from stabilitykit.guards.learning_rate import FACTOR
from trainers.guarding import GuardMode, check_mode

OptimizerName = Literal["sgd", "adam", "adamw"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer.

    Attributes:
        name: `sgd`, `adam` or `adamw`.
        lr: base learning rate.
        weight_decay: L2 for sgd and adam, decoupled for adamw.
        momentum: sgd's.
        nesterov: sgd's.
    """

    name: OptimizerName = "sgd"
    lr: float = 0.03
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.name not in get_args(OptimizerName):
            raise UsageError(f"--optimizer: got {self.name!r}, expected one of {', '.join(get_args(OptimizerName))}")
        if not 0 < self.lr < math.inf:
            raise UsageError(f"--lr: got {self.lr}, expected a finite number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise UsageError(f"--optim_wd: got {self.weight_decay}, expected a finite number, 0 or more")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"--optim_mom: got {self.momentum}, expected 0 or more and less than 1")
        if self.nesterov and not self.momentum:
            raise UsageError("--optim_nesterov: got 1 without momentum, expected --optim_mom above 0; set it")

    def build(self, network: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimizer for `network`."""
        if self.name == "sgd":
            return torch.optim.SGD(
                network.parameters(),
                lr=self.lr,
                momentum=self.momentum,
                weight_decay=self.weight_decay,
                nesterov=self.nesterov,
            )
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(network.parameters(), lr=self.lr, weight_decay=self.weight_decay)


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves: over tasks (guard 1: `on` a cosine, `hold` none), and within one (at epochs)."""

    over_tasks: GuardMode = "off"
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __post_init__(self) -> None:
        check_mode("use_lr_decay", self.over_tasks)
        if not 0 < self.gamma <= 1:
            raise UsageError(f"--sched_multistep_lr_gamma: got {self.gamma}, expected above 0 and up to 1")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of a run, known for every task and epoch before it begins."""

    config: ScheduleConfig
    base_lr: float
    num_tasks: int

    def lr(self, task: int, epoch: int = 0) -> float:
        """The learning rate in `epoch` of `task`, both from 0."""
        return self.base_lr * self.share(task, self.num_tasks) * self.within_task(epoch)

    @property
    def share(self) -> Callable[[int, int], float]:
        """What a task gets of the base rate."""
        return cosine_over_tasks if self.config.over_tasks == "on" else unchanged

    def within_task(self, epoch: int) -> float:
        """What the milestones leave of a task's rate."""
        return self.config.gamma ** sum(epoch >= milestone for milestone in self.config.milestones)

    def guard(self) -> LearningRateSchedule | None:
        """Guard 1, where it is on: it holds the rate of the task against whatever else writes to the optimizer."""
        if self.config.over_tasks == "off":
            return None
        return LearningRateSchedule(self.base_lr, self.num_tasks, share=self.share)

    def apply(self, optimizer: torch.optim.Optimizer, task: int, epoch: int = 0) -> None:
        """Set it, whatever the optimizer held before."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr(task, epoch) * group.get(FACTOR, 1.0)
