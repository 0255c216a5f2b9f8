"""The trainer: tasks one after another, a step per batch, an evaluation after each task."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from stabilitykit.errors import UsageError
from stabilitykit.guards import train_eval_gap
from stabilitykit.schema import plain
from trainers.checkpoint import write_checkpoint
from trainers.evaluation import evaluate, evaluate_unseen
from trainers.guarding import GuardMode, check_mode
from trainers.run_state import Position, capture
from trainers.stream import Stream, TaskSplit

if TYPE_CHECKING:
    from trainers.batch import Batch
    from trainers.progress import Progressing
    from trainers.results import Results
    from trainers.step import TrainingStep
    from trainers.watching import Watch


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long, and what happens between tasks.

    Attributes:
        num_epochs: per task.
        freeze_bn: BatchNorm's running statistics (guard 3): `on` freezes them after the first task, `hold` keeps them
            sound.
        stop_after: tasks to run; 0 for all.
        checkpoint_every: steps between checkpoints, which are also written when a task ends; 0 for those alone.
    """

    num_epochs: int = 1
    freeze_bn: GuardMode = "off"
    stop_after: int = 0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        check_mode("freeze_bn", self.freeze_bn)
        if self.num_epochs < 1:
            raise UsageError(f"--n_epochs: got {self.num_epochs}, expected 1 or more")
        if self.stop_after < 0:
            raise UsageError(f"--stop_after: got {self.stop_after}, expected 0 (all tasks) or more")
        if self.checkpoint_every < 0:
            raise UsageError(f"--checkpoint_every: got {self.checkpoint_every}, expected 0 (ends of tasks) or more")


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
        results: Results,
        progress: Progressing,
        run_dir: Path,
        facts: dict[str, Any],
    ) -> None:
        self.config = config
        self.test = test
        self.stream = stream
        self.step = step
        self.watch = watch
        self.results = results
        self.progress = progress
        self.run_dir = run_dir
        self.facts = facts
        self.position = Position()
        self.epoch_order = stream.order.get_state()
        self.network = step.method.network
        self.train_step: Callable[[Batch], Tensor | None] = step.guards.protect(
            watch.replayable(step), labels=lambda batch: batch.labels, sample_ids=lambda batch: batch.indices
        )
        self.started = time.process_time()

    def fit(self) -> Results:
        """Learn every task in turn, from wherever the run is."""
        if self.results.num_steps == 0:
            self.checkpoint()
            self.measure_untrained()
        while self.position.session < self.results.num_sessions:
            session = self.position.session
            self.begin_task(session)
            while self.position.epoch < self.config.num_epochs:
                self.run_epoch(session, self.position.epoch)
                self.position = Position(session, self.position.epoch + 1)
            self.end_task(session)
            self.position = Position(session + 1)
            self.checkpoint()
        return self.results

    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.num_epochs * sum(map(self.stream.num_batches, range(self.results.num_sessions)))

    def measure_untrained(self) -> None:
        """What the network that begins is worth on tasks it will learn later."""
        later = range(1, self.results.num_tasks if self.results.num_sessions > 1 else 1)
        self.results.untrained = evaluate_unseen(self.network, self.test, self.stream.transform, later)

    def begin_task(self, task: int) -> None:
        """Training mode, and an optimizer without a past: Mammoth builds a new one for each task."""
        self.network.train()
        if task and not self.position.within_session:
            upcoming = range(task, task + 1)
            self.results.add_before(evaluate_unseen(self.network, self.test, self.stream.transform, upcoming))
            self.step.optimizer.state.clear()

    def run_epoch(self, task: int, epoch: int) -> None:
        """Once through the task's images, or through the rest of them."""
        self.watch.log(task=task, epoch=epoch)
        if self.step.guards.learning_rate is None:
            self.step.schedule.apply(self.step.optimizer, task, epoch)
        self.epoch_order = self.stream.order.get_state()
        for batch in self.stream.batches(task, epoch, self.position.batch):
            loss = self.train_step(batch)
            self.position.batch += 1
            self.count(batch, loss)
            if self.config.checkpoint_every and self.results.num_steps % self.config.checkpoint_every == 0:
                self.checkpoint()

    def checkpoint(self) -> None:
        """Write the run's state; a full disk costs the checkpoint, not the run."""
        try:
            write_checkpoint(self.run_dir, capture(self, self.facts))
        except OSError as error:
            self.watch.log_event("checkpoint", f"not written: {error}", severity="warning")
            self.progress.say(f"checkpoint not written: {error}")

    def cpu_seconds(self) -> float:
        """CPU time of the run, all attempts together."""
        return time.process_time() - self.started

    def count(self, batch: Batch, loss: Tensor | None) -> None:
        """Note the step."""
        value = math.nan if loss is None else float(loss)
        self.results.num_skipped += not math.isfinite(value)
        self.results.num_steps += 1
        self.results.last_loss = value
        self.progress.step(batch.task, batch.epoch, value, self.step.grad_norm, self.results.num_skipped)

    def end_task(self, task: int) -> None:
        """Freeze what is to be frozen, evaluate, write the results."""
        self.step.guards.end_task(task)
        seen = self.stream.tasks_of(task)[-1]
        self.results.train_eval_gaps.append(self.gap(seen))
        self.results.add(evaluate(self.network, self.test, self.stream.transform, seen=seen))
        self.results.add_facts(self.step.method.end_task(task))
        self.results.guards = self.step.guards.counts()
        self.results.cpu_seconds = self.cpu_seconds()
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
