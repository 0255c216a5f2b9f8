"""Guard 8: replay weights that fall with the number of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from stabilitykit.errors import UsageError
from stabilitykit.guards.guard import Guard
from stabilitykit.guards.shares import linear_to_half


class AdaptiveReplayWeights(Guard):
    """The replay weights as a pure function of the task: by default they fall linearly to half by the last one.

    The fall is an option to be measured rather than a cure: it replays less exactly when there is more to remember.
    The first weights given are the run's; others that come later are put back and announced, since a weight that
    explodes takes the loss with it.

        weights = AdaptiveReplayWeights(num_tasks=10)
        for task, loader in enumerate(loaders):
            alpha, beta = weights(task, 0.3, 0.5)
            for batch in loader:
                loss = ce(batch) + alpha * distillation(batch) + beta * rehearsal(batch)

    Args:
        num_tasks: tasks of the run.
        share: task, number of tasks -> share of the weights; `unchanged` only holds them.

    Raises:
        UsageError: there is no task.
    """

    name: ClassVar[str] = "replay_weights"

    def __init__(
        self,
        num_tasks: int,
        *,
        share: Callable[[int, int], float] = linear_to_half,
        on_event: object | None = None,
    ) -> None:
        super().__init__(on_event)
        if num_tasks < 1:
            raise UsageError(f"AdaptiveReplayWeights: got num_tasks={num_tasks}, expected 1 or more")
        self.num_tasks, self.share = num_tasks, share
        self._task = 0
        self._held: tuple[float, float] | None = None

    def __call__(self, task: int, alpha: float, beta: float) -> tuple[float, float]:
        """The weights as they are in `task`, from 0."""
        held = self._hold(task, (alpha, beta))
        share = self.share(task, self.num_tasks)
        scaled = (held[0] * share, held[1] * share)
        if task != self._task and share != self.share(self._task, self.num_tasks):
            shown = ", ".join(f"{weight:.4g}" for weight in scaled)
            self.acted(f"replay weights {shown} in task {task}: {100 * share:.0f} %", severity="info", share=share)
        self._task = task
        return scaled

    def state_dict(self) -> dict[str, Any]:
        """How often it acted, the task it has announced, the weights it holds."""
        return super().state_dict() | {"task": self._task, "held": self._held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put all of it back."""
        super().load_state_dict(state)
        self._task = state["task"]
        self._held = None if state["held"] is None else (state["held"][0], state["held"][1])

    def _hold(self, task: int, given: tuple[float, float]) -> tuple[float, float]:
        """The weights that were given first."""
        self._held = self._held or given
        if given != self._held:
            message = f"replay weights were {given}, expected {self._held} in task {task}; put back"
            self.acted(message, found=list(given), expected=list(self._held), phase="forward")
        return self._held
