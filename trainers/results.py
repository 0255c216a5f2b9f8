"""results.json of a run folder: accuracies, what the guards did, what it cost."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabilitykit.errors import RunFolderError
from stabilitykit.record.folder import replace_file
from stabilitykit.schema import plain
from trainers.evaluation import Accuracies, backward_transfer, forgetting, forward_transfer, mean


@dataclass(kw_only=True)
class Results:
    """What a run has shown so far.

    Attributes:
        num_tasks: tasks of the run; `num_sessions` is how often it trains and evaluates: once when it learns jointly.
        class_il_matrix: row i after session i, column j accuracy on task j, percent.
        facts: what the method said of itself after each task.
        before: accuracies on tasks 1, 2, ... just before each was learnt; `untrained`: of the network that began.
    """

    method: str
    dataset: str
    seed: int
    command: list[str]
    num_tasks: int
    num_sessions: int
    class_il_matrix: list[list[float]] = field(default_factory=list)
    task_il_matrix: list[list[float]] = field(default_factory=list)
    before: Accuracies = field(default_factory=lambda: Accuracies([], []))
    untrained: Accuracies = field(default_factory=lambda: Accuracies([], []))
    train_eval_gaps: list[float] = field(default_factory=list)
    last_loss: float = math.nan
    num_steps: int = 0
    num_skipped: int = 0
    facts: dict[str, list[Any]] = field(default_factory=dict)
    guards: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0

    def add(self, accuracies: Accuracies) -> None:
        """Take in the accuracies after a task."""
        self.class_il_matrix.append(accuracies.class_il)
        self.task_il_matrix.append(accuracies.task_il)

    @property
    def class_il(self) -> float:
        """Mean Class-IL accuracy over the tasks seen, percent."""
        return mean(self.class_il_matrix[-1]) if self.class_il_matrix else math.nan

    @property
    def task_il(self) -> float:
        """Mean Task-IL accuracy over the tasks seen, percent."""
        return mean(self.task_il_matrix[-1]) if self.task_il_matrix else math.nan

    def add_before(self, accuracies: Accuracies) -> None:
        """Take in the accuracies on a task that is about to be learnt."""
        self.before.class_il.extend(accuracies.class_il)
        self.before.task_il.extend(accuracies.task_il)

    def add_facts(self, facts: dict[str, Any]) -> None:
        """Take in what the method says of a task: numbers make a list, a matrix replaces the one before."""
        for name, value in facts.items():
            self.facts[name] = value if isinstance(value, list) else [*self.facts.get(name, []), value]

    @property
    def finished(self) -> bool:
        """Whether every task has been learnt."""
        return len(self.class_il_matrix) == self.num_sessions

    def transfer(self) -> dict[str, float | None]:
        """Forgetting and transfers, of Class-IL and of Task-IL accuracy; undefined where there is one session only."""
        scores: dict[str, float | None] = {}
        for suffix, matrix, before, untrained in (
            ("", self.class_il_matrix, self.before.class_il, self.untrained.class_il),
            ("_task_il", self.task_il_matrix, self.before.task_il, self.untrained.task_il),
        ):
            known = len(matrix) > 1
            scores[f"forgetting{suffix}"] = forgetting(matrix) if known else None
            scores[f"bwt{suffix}"] = backward_transfer(matrix) if known else None
            scores[f"fwt{suffix}"] = forward_transfer(before, untrained) if known else None
        return scores

    def body(self) -> dict[str, Any]:
        """What the file holds: accuracies and transfers in percent after the last task seen."""
        return {
            "class_il": self.class_il,
            "task_il": self.task_il,
            **self.transfer(),
            "finished": self.finished,
            "method": self.method,
            "dataset": self.dataset,
            "num_tasks": self.num_tasks,
            "tasks_seen": len(self.class_il_matrix[-1]) if self.class_il_matrix else 0,
            "class_il_matrix": self.class_il_matrix,
            "task_il_matrix": self.task_il_matrix,
            "class_il_before": self.before.class_il,
            "class_il_untrained": self.untrained.class_il,
            "task_il_before": self.before.task_il,
            "task_il_untrained": self.untrained.task_il,
            "train_eval_gaps": self.train_eval_gaps,
            **self.facts,
            "last_loss": self.last_loss,
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "guards": self.guards,
            "seed": self.seed,
            "command": self.command,
            "cpu_seconds": self.cpu_seconds,
        }

    def write(self, run_dir: Path) -> None:
        """Replace results.json, whole or not at all."""
        text = json.dumps(plain(self.body()), indent=1, allow_nan=False)
        replace_file(run_dir, run_dir / "results.json", (text + "\n").encode())


def claim_run_folder(run_dir: Path) -> None:
    """Make sure `run_dir` is an empty folder that can be written.

    Raises:
        RunFolderError: it holds something, or cannot be made or written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if any(run_dir.iterdir()):
            raise RunFolderError(f"--run_dir: {run_dir} holds another run, expected an empty folder; name another")
        with tempfile.TemporaryFile(dir=run_dir):
            pass
    except RunFolderError:
        raise
    except OSError as error:
        raise RunFolderError(
            f"--run_dir: {run_dir}: {error.strerror or error}, expected a folder that can be written; name another"
        ) from error
