"""Optimizers that are made after the monitor was attached: one a task, or after the first batch."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

import stabilitykit as sk

QUIET = sk.MonitorConfig(report=False, compact=False, snapshot_every=4)
NUM_STEPS = 12


class Tasks:
    """Two tasks, each with an optimizer of its own; `bad` names the batch that holds a NaN."""

    def __init__(
        self, *, bad: int | None = None, without: int | None = None, change: int = 6, dropout: float = 0.2
    ) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))
        self.batches: list[tuple[int, Tensor]] = [(index, torch.randn(5, 4)) for index in range(NUM_STEPS)]
        if bad is not None:
            self.batches[bad][1][2, 1] = math.nan
        self.batches = [entry for entry in self.batches if entry[0] != without]
        self.change = change
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)

    def step(self, batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.model(batch).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def run(self, step: Any = None) -> list[Tensor | None]:
        step = step or self.step
        losses, first = [], self.optimizer
        for index, batch in self.batches:
            if index >= self.change and self.optimizer is first:
                self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
            losses.append(step(batch))
        return losses

    def contents(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()["state"]
        return {
            "model": {name: entry.numpy().tobytes() for name, entry in self.model.state_dict().items()},
            "optimizer": {(i, key): v.numpy().tobytes() for i, held in state.items() for key, v in held.items()},
            "torch": torch.get_rng_state().numpy().tobytes(),
        }


def bits(losses: list[Tensor | None]) -> list[bytes | None]:
    return [None if loss is None else loss.numpy().tobytes() for loss in losses]


@pytest.mark.parametrize("named", [True, False], ids=["the first named", "none named"])
@pytest.mark.parametrize("bad", [None, 0, 3, 6, 7, 11])
def test_a_fault_under_a_new_optimizer_is_explained_and_the_run_left_as_it_would_have_been(
    bad: int | None, named: bool, tmp_path: Path
) -> None:
    expected = Tasks(bad=bad)
    losses = expected.run()
    training = Tasks(bad=bad)

    given = training.optimizer if named else None
    with sk.attach(training.model, given, tmp_path / "run", config=QUIET, on_nonfinite="record") as monitor:
        found = training.run(monitor.replayable(training.step))

    assert bits(found) == bits(losses)
    assert training.contents() == expected.contents()
    if bad is None:
        assert monitor.diagnosis is None
    else:
        assert monitor.diagnosis is not None
        origin = monitor.diagnosis.origin
        assert (origin.step, origin.phase, origin.samples) == (bad, "data", (2,))
        assert origin.proof == "replayed"


@pytest.mark.parametrize("bad", [5, 6, 7])
def test_skip_is_as_if_the_batch_had_never_been(bad: int, tmp_path: Path) -> None:
    expected = Tasks(without=bad, dropout=0.0)
    expected.run()
    training = Tasks(bad=bad, dropout=0.0)

    with sk.attach(training.model, training.optimizer, tmp_path / "run", config=QUIET, on_nonfinite="skip") as monitor:
        losses = training.run(monitor.replayable(training.step))

    found, wanted = training.contents(), expected.contents()
    assert losses[bad] is None
    assert found["optimizer"] == wanted["optimizer"]
    if bad != training.change:
        assert found["model"] == wanted["model"]
    else:  # running statistics had followed the forward when the optimizer showed itself: they are some steps old
        assert all(entry.isfinite().all() for entry in training.model.buffers())
        assert all(found["model"][name] == wanted["model"][name] for name, _ in training.model.named_parameters())


def test_a_plain_loop_goes_on_being_watched_with_the_new_optimizers_rate(tmp_path: Path) -> None:
    training = Tasks(bad=9)

    with sk.attach(
        training.model, training.optimizer, tmp_path / "run", config=QUIET, on_nonfinite="record"
    ) as monitor:
        training.run()

    steps = sk.open_run(tmp_path / "run").steps()
    assert len(steps) == NUM_STEPS
    assert steps["lr"].tolist() == [0.01] * 6 + [0.02] * 6
    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.step == 9


def test_a_plain_loop_needs_no_optimizer_named(tmp_path: Path) -> None:
    training = Tasks()

    with sk.attach(training.model, None, tmp_path / "run", config=QUIET):
        training.run()

    run = sk.open_run(tmp_path / "run")
    assert len(run.steps()) == NUM_STEPS
    assert list(run.events()["kind"]) == ["optimizer", "optimizer"]


def test_an_optimizer_of_another_model_is_left_alone(tmp_path: Path) -> None:
    training, other = Tasks(), Tasks()

    with sk.attach(training.model, training.optimizer, tmp_path / "run", config=QUIET) as monitor:
        other.run()

    assert monitor.step_index == 0


def test_two_optimizers_that_take_turns_are_both_put_back(tmp_path: Path) -> None:
    def run(watched: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        training = Tasks(bad=9, change=NUM_STEPS)
        other = torch.optim.Adam(training.model.parameters(), lr=0.03)
        step = training.step

        def both(batch: Tensor) -> Tensor:
            step(batch)
            training.optimizer, kept = other, training.optimizer
            loss = step(batch)
            training.optimizer = kept
            return loss

        if not watched:
            training.run(both)
        else:
            given = training.optimizer
            with sk.attach(training.model, given, tmp_path / "run", config=QUIET, on_nonfinite="record") as monitor:
                training.run(monitor.replayable(both))
            assert monitor.diagnosis is not None
            assert monitor.diagnosis.origin.proof == "replayed"
        first, training.optimizer = training.contents(), other
        return first, training.contents()

    assert run(True) == run(False)


def test_an_optimizer_that_was_replaced_is_let_go(tmp_path: Path) -> None:
    training = Tasks()
    replaced = weakref.ref(training.optimizer)

    with sk.attach(training.model, training.optimizer, tmp_path / "run", config=QUIET) as monitor:
        training.run(monitor.replayable(training.step))
        gc.collect()

        assert replaced() is None  # nor do snapshots hold it: the last is younger


@pytest.mark.parametrize("replayable", [True, False])
def test_a_run_that_nobody_closed_keeps_neither_model_nor_hooks_alive(replayable: bool, tmp_path: Path) -> None:
    """As when the cell of a notebook is run again."""
    before = len(torch_optimizer._global_optimizer_pre_hooks)
    training = Tasks()
    monitor = sk.attach(training.model, training.optimizer, tmp_path / "run", config=QUIET)
    training.run(monitor.replayable(training.step) if replayable else None)
    left = weakref.ref(training.model), weakref.ref(training.optimizer), weakref.ref(monitor)
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before + 1

    del monitor, training
    gc.collect()

    assert [reference() for reference in left] == [None, None, None]
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before
    assert sk.open_run(tmp_path / "run").ending == "completed"
