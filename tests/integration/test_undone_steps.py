"""A step that is undone leaves the weights it found, whatever it is given and whatever the loop around it does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.snapshot import TrainingState

QUIET = sk.MonitorConfig(report=False, compact=False, snapshot_every=100)


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_model_and_optimizer_among_the_arguments_are_never_copied(tmp_path: Path) -> None:
    model, optimizer = network()
    given: list[bool] = []

    def train_step(given_model: nn.Module, given_optimizer: torch.optim.Optimizer, batch: Tensor) -> Tensor:
        given.append(given_model is model and given_optimizer is optimizer)
        batch.sub_(0.5)  # so its batches are copied from here on
        given_optimizer.zero_grad()
        loss = given_model(batch).square().mean()
        loss.backward()
        given_optimizer.step()
        return loss

    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET, on_nonfinite="skip") as monitor:
        step = monitor.replayable(train_step)
        for _ in range(4):
            step(model, optimizer, torch.randn(5, 4))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step(model, optimizer, torch.full((5, 4), torch.nan))

    assert all(given)
    assert all(map(torch.equal, before, model.parameters()))
    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.proof == "replayed"


def kept_to_none(optimizer: torch.optim.Optimizer, _model: nn.Module) -> None:
    optimizer.zero_grad()


def kept_to_zeros(optimizer: torch.optim.Optimizer, _model: nn.Module) -> None:
    optimizer.zero_grad(set_to_none=False)


def of_one_layer(_optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    model[2].zero_grad()


def filled_anew(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 4)).mean().backward()


@pytest.mark.parametrize(
    ("change", "num_snapshots"), [(kept_to_none, 1), (of_one_layer, 1), (kept_to_zeros, 4), (filled_anew, 4)]
)
def test_a_loop_that_changes_gradients_between_steps_gets_its_weights_back(
    change: Callable[[torch.optim.Optimizer, nn.Module], None],
    num_snapshots: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, optimizer = network()
    captures = counted_captures(monkeypatch)

    def train_step(batch: Tensor) -> Tensor:
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET, on_nonfinite="skip") as monitor:
        step = monitor.replayable(train_step)
        for _ in range(4):
            change(optimizer, model)
            step(torch.randn(5, 4))
        taken = len(captures)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        change(optimizer, model)
        step(torch.full((5, 4), torch.nan))

    assert taken == num_snapshots
    assert all(map(torch.equal, before, model.parameters()))
    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.proof == "replayed"


def counted_captures(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every snapshot."""
    captures: list[object] = []
    capture = TrainingState.capture

    def counted(state: TrainingState, *args: Any) -> Any:
        captures.append(state)
        return capture(state, *args)

    monkeypatch.setattr(TrainingState, "capture", counted)
    return captures


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
@pytest.mark.parametrize("in_step", [False, True], ids=["in the loop", "in the step"])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_learning_rate_and_scheduler_agree_after_a_step_is_undone(
    policy: str, in_step: bool, named: bool, tmp_path: Path
) -> None:
    model, optimizer = network()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    def train_step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        if in_step:
            scheduler.step()
        return loss

    config = QUIET.replace(snapshot_every=2, rollback_steps=1)
    stateful = [scheduler] if named else []
    with sk.attach(
        model, optimizer, tmp_path / "run", config=config, on_nonfinite=policy, stateful=stateful
    ) as monitor:
        step = monitor.replayable(train_step)
        for index in range(10):
            step(torch.full((5, 4), torch.nan if index == 5 else 1.0))
            if not in_step:
                scheduler.step()

    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**scheduler.last_epoch


@pytest.mark.parametrize(("budget", "every"), [(0.0, 6), (1e9, 3)], ids=["beyond the budget", "within the budget"])
def test_batches_that_fill_their_memory_force_fewer_snapshots_where_these_cost_too_much(
    budget: float, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = network()
    captures = counted_captures(monkeypatch)
    taken: list[int] = []

    def train_step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    batch = torch.randn(50, 4)
    config = sk.MonitorConfig(report=False, compact=False, history_bytes=5 * batch.nbytes, snapshot_budget=budget)
    with sk.attach(model, optimizer, tmp_path / "run", config=config, on_nonfinite="skip") as monitor:
        step = monitor.replayable(train_step)
        for _ in range(15):
            step(batch.clone())
            taken.append(len(captures))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        step(batch * torch.nan)

    assert [step for step, (old, new) in enumerate(itertools.pairwise([0, *taken])) if new > old] == [
        *range(0, 15, every)
    ]
    assert all(map(torch.equal, before, model.parameters()))
    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.proof == "replayed"


@pytest.mark.parametrize(("snapshot_every", "told"), [(100, 2), (1, 0)])
def test_a_step_undone_by_way_of_others_that_differed_is_told_of(
    snapshot_every: int, told: int, tmp_path: Path
) -> None:
    model, optimizer = network()
    ticks = itertools.count(1)  # nobody puts it back

    def train_step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean() * next(ticks)
        loss.backward()
        optimizer.step()
        return loss

    config = QUIET.replace(snapshot_every=snapshot_every, replays=1)
    with sk.attach(model, optimizer, tmp_path / "run", config=config, on_nonfinite="skip") as monitor:
        step = monitor.replayable(train_step)
        for bad in (False, False, True, False, True):  # the second is undone without a diagnosis of its own
            step(torch.full((5, 4), torch.nan if bad else 1.0))

    events = sk.open_run(tmp_path / "run").events()
    assert monitor.diagnosis is not None
    assert list(events[events.kind == "replayed_differs"].step) == [2, 4][:told]
    assert any("may not be those it had" in remedy for remedy in monitor.diagnosis.remedies) == bool(told)
