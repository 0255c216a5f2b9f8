"""A replayed step is the failing step to the bit, whatever it drew and whatever it changed; and we say so when not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk

FAULT = 7  # of steps 0 to 7; with a snapshot every 5 it lies between two


class Counter:
    """State of the caller's that a step changes."""

    def __init__(self) -> None:
        self.count = 1

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Story:
    """A training whose last step overflows, and what else its steps read and write."""

    stateful: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.model = self.network()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.batches = [torch.randn(6, 4) for _ in range(FAULT)] + [torch.full((6, 4), 1e30)]

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def factor(self) -> float:
        return 1.0

    def step(self, batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = (self.model(batch) * self.factor()).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss


class Dropout(Story):
    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))


class BatchNorm(Story):
    def network(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4, momentum=0.5), nn.Linear(4, 2))

    def step(self, batch: Tensor) -> Tensor:  # the running mean enters, the normalised batch would hide the overflow
        self.optimizer.zero_grad()
        loss = (self.model(batch) + self.model[0].running_mean.mean() + batch.mean()).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss


class NumpyNoise(Story):
    def factor(self) -> float:
        return float(np.random.uniform(0.5, 1.5))  # noqa: NPY002 - the global stream


class PythonNoise(Story):
    def factor(self) -> float:
        return random.uniform(0.5, 1.5)


class OwnGenerator(Story):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(4)
        self.stateful = (self.generator,)

    def factor(self) -> float:
        return torch.rand((), generator=self.generator).item()


class OwnState(Story):
    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()
        self.stateful = (self.counter,)

    def factor(self) -> float:
        self.counter.count += 1
        return 1 / self.counter.count


class Scheduled(Story):
    def __init__(self) -> None:
        super().__init__()
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.stateful = (self.scheduler,)

    def step(self, batch: Tensor) -> Tensor:
        loss = super().step(batch)
        self.scheduler.step()
        return loss


class ModeSwitching(Dropout):
    def factor(self) -> float:
        self.model.train(not self.model.training)
        return 1.0


STORIES = (Story, Dropout, BatchNorm, NumpyNoise, PythonNoise, OwnGenerator, OwnState, Scheduled, ModeSwitching)


def diagnosed(story: Story, run_dir: Path, **options: Any) -> sk.Diagnosis:
    config = sk.MonitorConfig(report=False, compact=False, **options)
    with sk.attach(
        story.model, story.optimizer, run_dir, config=config, stateful=story.stateful, on_nonfinite="record"
    ) as monitor:
        step = monitor.replayable(story.step)
        for batch in story.batches:
            step(batch)
    assert monitor.diagnosis is not None
    return monitor.diagnosis


@pytest.mark.parametrize("snapshot_every", [1, 5, 20])
@pytest.mark.parametrize("story", STORIES)
def test_the_replay_is_exact(story: Callable[[], Story], snapshot_every: int, tmp_path: Path) -> None:
    diagnosis = diagnosed(story(), tmp_path / "run", snapshot_every=snapshot_every)

    assert diagnosis.origin.proof == "replayed"
    assert diagnosis.origin.step == FAULT
    assert diagnosis.origin.kind == "inf"


class Clock(Story):
    """A step that reads something nobody can put back; the gradient of its temperature stays finite and shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks = itertools.count(1)

    def network(self) -> nn.Module:
        model = super().network()
        model.register_parameter("temperature", nn.Parameter(torch.ones(())))
        return model

    def step(self, batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.model(batch).square().mean() + self.model.temperature * next(self.ticks)
        loss.backward()
        self.optimizer.step()
        return loss


@pytest.mark.parametrize("snapshot_every", [1, 5, 20])
def test_a_step_that_reads_a_clock_is_said_to_differ(snapshot_every: int, tmp_path: Path) -> None:
    diagnosis = diagnosed(Clock(), tmp_path / "run", snapshot_every=snapshot_every)

    assert diagnosis.origin.proof == "replayed-differs"


class EarlyClock(Story):
    """The steps before the fault read a clock, in what they return alone; the failing one does not."""

    def __init__(self) -> None:
        super().__init__()
        self.ticks = itertools.count(1)

    def step(self, batch: Tensor) -> Tensor:
        loss = super().step(batch)
        return loss if batch.abs().max() > 1e20 else loss + next(self.ticks)


@pytest.mark.parametrize(("snapshot_every", "proof"), [(20, "replayed-differs"), (1, "replayed")])
def test_the_steps_since_the_snapshot_must_be_exact_as_well(snapshot_every: int, proof: str, tmp_path: Path) -> None:
    diagnosis = diagnosed(EarlyClock(), tmp_path / "run", snapshot_every=snapshot_every)

    assert diagnosis.origin.proof == proof


def test_a_batch_that_was_written_into_since_is_said_to_differ(tmp_path: Path) -> None:
    story = Story()
    shared = torch.zeros(6, 4)
    config = sk.MonitorConfig(report=False, compact=False, snapshot_every=20)
    with sk.attach(story.model, story.optimizer, tmp_path / "run", config=config, on_nonfinite="record") as monitor:
        step = monitor.replayable(story.step)
        for batch in story.batches:
            step(shared.copy_(batch))

    assert monitor.diagnosis.origin.proof == "replayed-differs"


def test_a_state_changed_between_steps_is_captured_anew(tmp_path: Path) -> None:
    story = Story()
    config = sk.MonitorConfig(report=False, compact=False, snapshot_every=20)
    with sk.attach(story.model, story.optimizer, tmp_path / "run", config=config, on_nonfinite="record") as monitor:
        step = monitor.replayable(story.step)
        for batch in story.batches:
            with torch.no_grad():
                story.model[0].weight.mul_(0.9)  # weight averaging, say
            step(batch)

    assert monitor.diagnosis.origin.proof == "replayed"


def test_the_caller_is_told_when_a_step_is_a_replay(tmp_path: Path) -> None:
    story = Story()
    told = []
    config = sk.MonitorConfig(report=False, compact=False, snapshot_every=5)
    with sk.attach(story.model, story.optimizer, tmp_path / "run", config=config, on_nonfinite="record") as monitor:

        def train_step(batch: Tensor) -> Tensor:
            told.append(monitor.replaying)
            return story.step(batch)

        step = monitor.replayable(train_step)
        for batch in story.batches:
            step(batch)

    assert told == [False] * 8 + [True] * 8  # from the snapshot before the last one on, for the run-up
    assert not monitor.replaying


def test_the_steps_on_the_way_are_recorded_in_full_although_they_were_not_the_first_time(tmp_path: Path) -> None:
    diagnosed(Story(), tmp_path / "run", snapshot_every=5, cadence=100)

    recorded = sk.open_run(tmp_path / "run").tensors(role="output")
    assert set(recorded["step"]) == set(range(8))
