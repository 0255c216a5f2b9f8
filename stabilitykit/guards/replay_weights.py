"""Guard 8: replay weights that fall with the number of tasks."""

from __future__ import annotations

from typing import Any, ClassVar

from stabilitykit.errors import UsageError
from stabilitykit.guards.guard import Guard


def linear_to_half(task: int, num_tasks: int) -> float:
    """Share of the replay weights, 100 % at the first task, 50 % at the last."""
    return 1 - 0.5 * task / max(1, num_tasks - 1)


class AdaptiveReplayWeights(Guard):
    """The replay weights of a task: they fall linearly to half by the last one.

    An option to be measured rather than a cure: it replays less exactly when there is more to remember.

        weights = AdaptiveReplayWeights(num_tasks=10)
        for task, loader in enumerate(loaders):
            alpha, beta = weights(task, 0.3, 0.5)
            for batch in loader:
                loss = ce(batch) + alpha * distillation(batch) + beta * rehearsal(batch)

    Raises:
        UsageError: there is no task.
    """

    name: ClassVar[str] = "replay_weights"

    def __init__(self, num_tasks: int, *, on_event: object | None = None) -> None:
        super().__init__(on_event)
        if num_tasks < 1:
            raise UsageError(f"AdaptiveReplayWeights: got num_tasks={num_tasks}, expected 1 or more")
        self.num_tasks = num_tasks
        self._task = 0

    def __call__(self, task: int, alpha: float, beta: float) -> tuple[float, float]:
        """The weights as they are in `task`, from 0."""
        share = linear_to_half(task, self.num_tasks)
        scaled = (alpha * share, beta * share)
        if task != self._task:
            self._task = task
            shown = ", ".join(f"{weight:.4g}" for weight in scaled)
            self.acted(f"replay weights {shown} in task {task}: {100 * share:.0f} %", severity="info", share=share)
        return scaled

    def state_dict(self) -> dict[str, Any]:
        """How often it acted, and the task it has announced."""
        return super().state_dict() | {"task": self._task}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put both back."""
        super().load_state_dict(state)
        self._task = state["task"]
