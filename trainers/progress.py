"""What one sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Progressing(Protocol):
    """Told of every step."""

    def start(self, title: str, num_steps: int, done: int = 0) -> None:
        """A run begins."""

    def step(self, task: int, epoch: int, loss: float, grad_norm: float, skipped: int) -> None:
        """A step is over."""

    def say(self, text: str) -> None:
        """Something worth a line."""

    def stop(self) -> None:
        """The run is over, however it ended."""


class NoProgress:
    """Says nothing."""

    def start(self, title: str, num_steps: int, done: int = 0) -> None:
        """Nothing."""

    def step(self, task: int, epoch: int, loss: float, grad_norm: float, skipped: int) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def stop(self) -> None:
        """Nothing."""


class PlainProgress(NoProgress):
    """A line every few seconds."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self.every_seconds = every_seconds
        self.title, self.num_steps, self.done, self.last = "", 0, 0, 0.0

    def start(self, title: str, num_steps: int, done: int = 0) -> None:
        """Announce the run."""
        self.title, self.num_steps, self.done, self.last = title, num_steps, done, time.monotonic()
        print(f"{title}: {num_steps:,} steps", flush=True)

    def step(self, task: int, epoch: int, loss: float, grad_norm: float, skipped: int) -> None:
        """Print a line when one is due."""
        self.done += 1
        if time.monotonic() - self.last >= self.every_seconds or self.done == self.num_steps:
            self.last = time.monotonic()
            facts = describe(task, epoch, loss, grad_norm, skipped)
            print(f"{self.title}: {self.done:,}/{self.num_steps:,}  {facts}", flush=True)

    def say(self, text: str) -> None:
        """Print it."""
        print(f"{self.title}: {text}", flush=True)


class BarProgress(NoProgress):
    """A bar with loss, gradient norm and skipped steps."""

    def __init__(self) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=Console(),
        )
        self.row: TaskID | None = None

    def start(self, title: str, num_steps: int, done: int = 0) -> None:
        """Show the bar."""
        self.bar.start()
        self.row = self.bar.add_task(title, total=num_steps, completed=done, facts="")

    def step(self, task: int, epoch: int, loss: float, grad_norm: float, skipped: int) -> None:
        """Move it."""
        if self.row is not None:
            self.bar.update(self.row, advance=1, facts=describe(task, epoch, loss, grad_norm, skipped))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()


def describe(task: int, epoch: int, loss: float, grad_norm: float, skipped: int) -> str:
    """The facts beside the bar."""
    return f"task {task} epoch {epoch}  loss {loss:.4g}  gradient {grad_norm:.3g}  skipped {skipped}"


def for_stdout() -> Progressing:
    """A bar on a terminal, plain lines elsewhere."""
    return BarProgress() if sys.stdout.isatty() else PlainProgress()
