"""Guard 1: the learning rate as a pure function of the task, put back whenever something else has changed it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

from torch.optim import Optimizer

from stabilitykit.errors import UsageError
from stabilitykit.guards.guard import Guard
from stabilitykit.guards.shares import cosine_over_tasks

# Keys of a parameter group, kept there so that they travel with it: what `StepValidation` slows the group down by
# after a rollback, and the rate this came to.
FACTOR, COOLED = "lr_factor", "lr_cooled"


class LearningRateSchedule(Guard):
    """Sets the rate of the current task, at every step: no rebuilt optimizer loses it, no stray write lasts.

    A decay written into the optimizer at the end of a task is lost when the next task builds a new optimizer. Here the
    rate belongs to the task, and applying it again is free:

        schedule = LearningRateSchedule(0.03, num_tasks=10)
        for task, loader in enumerate(loaders):
            for batch in loader:
                schedule.apply(optimizer, task)
                train_step(batch)

    Args:
        base_lr: rate of the first task.
        num_tasks: tasks of the run.
        share: task, number of tasks -> share of the base rate; `unchanged` only holds it.

    Raises:
        UsageError: the rate is not finite and above 0, or there is no task.
    """

    name: ClassVar[str] = "lr"

    def __init__(
        self,
        base_lr: float,
        num_tasks: int,
        *,
        share: Callable[[int, int], float] = cosine_over_tasks,
        on_event: object | None = None,
    ) -> None:
        super().__init__(on_event)
        if not 0 < base_lr < math.inf:
            raise UsageError(f"LearningRateSchedule: got base_lr={base_lr}, expected a finite number above 0")
        if num_tasks < 1:
            raise UsageError(f"LearningRateSchedule: got num_tasks={num_tasks}, expected 1 or more")
        self.base_lr, self.num_tasks, self.share = base_lr, num_tasks, share
        self._applied: tuple[int, float] | None = None

    def lr(self, task: int) -> float:
        """The learning rate in `task`, from 0."""
        return self.base_lr * self.share(task, self.num_tasks)

    def apply(self, optimizer: Optimizer, task: int, *, within: float = 1.0) -> None:
        """Set it, whatever the optimizer holds.

        Args:
            optimizer: all its parameter groups are set.
            task: the current task, from 0.
            within: a factor of the caller's for schedules within a task.
        """
        rate = self.lr(task) * within
        for group in optimizer.param_groups:
            expected = rate * group.get(FACTOR, 1.0)
            if group["lr"] != expected:
                self._say(group["lr"], expected, task, lost=self._is_lost(group["lr"], task, rate))
                group["lr"] = expected
        self._applied = task, rate

    def _is_lost(self, found: float, task: int, rate: float) -> bool:
        """Whether the rate found is neither the last task's nor that of an optimizer newly built."""
        return self._applied is not None and (
            self._applied == (task, rate) or found not in (self._applied[1], self.base_lr)
        )

    def _say(self, found: float, expected: float, task: int, *, lost: bool) -> None:
        if lost:
            message = f"learning rate was {found:.6g}, expected {expected:.6g} in task {task}; put back"
            self.acted(message, found=float(found), expected=expected, phase="optimizer")
        else:
            self.acted(f"learning rate {found:.6g} -> {expected:.6g} for task {task}", severity="info", lr=expected)
