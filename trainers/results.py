"""results.json of a run folder: accuracies, what the guards did, what it cost."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabilitykit.errors import RunFolderError
from stabilitykit.schema import plain
from trainers.evaluation import Accuracies, backward_transfer, forgetting, mean


@dataclass(kw_only=True)
class Results:
    """What a run has shown so far."""

    seed: int
    command: list[str]
    num_tasks: int
    class_il_matrix: list[list[float]] = field(default_factory=list)
    task_il_matrix: list[list[float]] = field(default_factory=list)
    train_eval_gaps: list[float] = field(default_factory=list)
    last_loss: float = math.nan
    num_steps: int = 0
    num_skipped: int = 0
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

    def body(self) -> dict[str, Any]:
        """What the file holds."""
        seen = len(self.class_il_matrix)
        return {
            "class_il": self.class_il,
            "task_il": self.task_il,
            "finished": seen == self.num_tasks,
            "num_tasks": self.num_tasks,
            "tasks_seen": seen,
            "forgetting": forgetting(self.class_il_matrix) if seen else math.nan,
            "backward_transfer": backward_transfer(self.class_il_matrix) if seen else math.nan,
            "class_il_matrix": self.class_il_matrix,
            "task_il_matrix": self.task_il_matrix,
            "train_eval_gaps": self.train_eval_gaps,
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
        handle, name = tempfile.mkstemp(dir=run_dir, prefix="results.", suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        Path(name).replace(run_dir / "results.json")


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
