"""The trainer: tasks one after another, a step per batch, an evaluation after each task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from stabilitykit.errors import UsageError
from stabilitykit.schema import plain
from trainers.evaluation import evaluate, evaluate_unseen
from trainers.guards import freeze_batch_norm, train_eval_gap
from trainers.stream import Stream, TaskSplit

if TYPE_CHECKING:
    from trainers.batch import Batch
    from trainers.progress import Progressing
    from trainers.results import Results
    from trainers.step import TrainingStep
    from trainers.watching import SkipCounter, Watch


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, and what happens between tasks.

    Attributes:
        num_epochs: per task.
        freeze_bn: freeze BatchNorm's statistics after the first task (guard 3).
        stop_after: tasks to run; 0 for all.
    """

    num_epochs: int = 1
    freeze_bn: bool = False
    stop_after: int = 0

    def __post_init__(self) -> None:
        if self.num_epochs < 1:
            raise UsageError(f"--n_epochs: got {self.num_epochs}, expected 1 or more")
        if self.stop_after < 0:
            raise UsageError(f"--stop_after: got {self.stop_after}, expected 0 (all tasks) or more")


class Trainer:
    """A run, from the first task to the last."""

    def __init__(
        self,
        config: TrainerConfig,
        *,
        test: TaskSplit,
        stream: Stream,
        step: TrainingStep,
        watch: Watch,
        skips: SkipCounter,
        results: Results,
        progress: Progressing,
        run_dir: Path,
    ) -> None:
        self.config = config
        self.test = test
        self.stream = stream
        self.step = step
        self.watch = watch
        self.skips = skips
        self.results = results
        self.progress = progress
        self.run_dir = run_dir
        self.network = step.method.network
        self.train_step: Callable[[Batch], Tensor | None] = watch.replayable(step)
        self.started = time.process_time()

    def fit(self) -> Results:
        """Learn every task in turn."""
        self.measure_untrained()
        for task in range(self.results.num_sessions):
            self.begin_task(task)
            for epoch in range(self.config.num_epochs):
                self.run_epoch(task, epoch)
            self.end_task(task)
        return self.results

    def measure_untrained(self) -> None:
        """What the network that begins is worth on tasks it will learn later."""
        later = range(1, self.results.num_tasks if self.results.num_sessions > 1 else 1)
        self.results.untrained = evaluate_unseen(self.network, self.test, self.stream.transform, later)

    def begin_task(self, task: int) -> None:
        """Training mode, and an optimizer without a past: Mammoth builds a new one for each task."""
        self.network.train()
        if task:
            upcoming = range(task, task + 1)
            self.results.add_before(evaluate_unseen(self.network, self.test, self.stream.transform, upcoming))
            self.step.optimizer.state.clear()

    def run_epoch(self, task: int, epoch: int) -> None:
        """Once through the task's images."""
        self.watch.log(task=task, epoch=epoch)
        for batch in self.stream.batches(task, epoch):
            loss = self.train_step(batch)
            self.count(batch, loss)

    def count(self, batch: Batch, loss: Tensor | None) -> None:
        """Note the step, and end a run that only skips."""
        value = math.nan if loss is None else float(loss)
        self.skips(loss)
        self.results.num_steps += 1
        self.results.num_skipped = self.skips.total
        self.results.last_loss = value
        self.progress.step(batch.task, batch.epoch, value, self.step.grad_norm, self.skips.total)

    def end_task(self, task: int) -> None:
        """Freeze what is to be frozen, evaluate, write the results."""
        if self.config.freeze_bn and task == 0:
            frozen = freeze_batch_norm(self.network)
            self.watch.log_event("guard", f"{frozen} BatchNorm layers frozen after the first task", subject="freeze_bn")
        seen = self.stream.tasks_of(task)[-1]
        self.results.train_eval_gaps.append(self.gap(seen))
        self.results.add(evaluate(self.network, self.test, self.stream.transform, seen=seen))
        self.results.add_facts(self.step.method.end_task(task))
        self.results.guards = self.guard_counts()
        self.results.cpu_seconds = time.process_time() - self.started
        self.watch.log(class_il=self.results.class_il, task_il=self.results.task_il)
        self.watch.note(results=plain(self.results.body()))
        self.results.write(self.run_dir)
        self.progress.say(
            f"task {task}: Class-IL {self.results.class_il:.2f} %, Task-IL {self.results.task_il:.2f} %, "
            f"train/eval gap {self.results.train_eval_gaps[-1]:.3g}"
        )

    def gap(self, task: int) -> float:
        """How differently the network behaves in training and in evaluation, on test images of the task."""
        images = self.test.examples(self.test.members(task)[:64], task)
        return train_eval_gap(self.network, self.stream.transform.normalise(images))

    def guard_counts(self) -> dict[str, int]:
        """How often each guard acted."""
        buffer = self.step.method.buffer
        frozen = sum(type(module).__name__.startswith("Frozen") for module in self.network.modules())
        return {
            "buffer_rejected": buffer.num_rejected,
            "buffer_quarantined": buffer.num_quarantined,
            "gradients_clipped": self.step.clip.num_clipped,
            "batch_norms_frozen": frozen,
            "steps_skipped": self.skips.total,
        }
