"""Schedulers and scalers that were not named to attach: a replay leaves them as it found them."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.monitor.bystanders import bystanders_put_back

QUIET = sk.MonitorConfig(report=False, compact=False, snapshot_every=4)
NUM_STEPS = 10


def scheduled() -> tuple[nn.Module, torch.optim.Optimizer, Any, Any]:
    """A step that ends with the scheduler's."""
    model, optimizer = network()
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4 * NUM_STEPS)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.detach()

    return model, optimizer, scheduler, step


def scaled() -> tuple[nn.Module, torch.optim.Optimizer, Any, Any]:
    """A scaler whose first scale overflows."""
    model, optimizer = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = 100 * model(batch).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return model, optimizer, scaler, step


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def batches(bad: int | None) -> list[Tensor]:
    made = list(torch.randn(NUM_STEPS, 5, 4, generator=torch.Generator().manual_seed(1)))
    if bad is not None:
        made[bad][0, 0] = math.nan
    return made


@pytest.mark.parametrize("bad", [None, 6])
@pytest.mark.parametrize("build", [scheduled, scaled])
def test_a_run_is_recorded_without_moving_what_nobody_named(build: Any, bad: int | None, tmp_path: Path) -> None:
    model, optimizer, bystander, step = build()
    expected = [step(batch).numpy().tobytes() for batch in batches(bad)]
    rate, state = optimizer.param_groups[0]["lr"], bystander.state_dict()
    weights = [entry.detach().numpy().tobytes() for entry in model.parameters()]
    model, optimizer, bystander, step = build()

    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET, on_nonfinite="record") as monitor:
        watched = monitor.replayable(step)
        found = [watched(batch).numpy().tobytes() for batch in batches(bad)]

    assert found == expected
    assert (optimizer.param_groups[0]["lr"], bystander.state_dict()) == (rate, state)
    assert [entry.detach().numpy().tobytes() for entry in model.parameters()] == weights
    assert (monitor.diagnosis is None) == (bad is None)


def test_what_moves_in_the_block_is_put_back_and_no_method_stays_wrapped() -> None:
    _, optimizer = network()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    optimizer.step()
    methods = torch.optim.lr_scheduler.LRScheduler.step, torch.optim.lr_scheduler.ReduceLROnPlateau.step
    before = scheduler.state_dict(), plateau.state_dict()

    with bystanders_put_back():
        scheduler.step()
        plateau.step(1.0)
        moved = scheduler.state_dict(), plateau.state_dict()

    assert moved != before
    assert (scheduler.state_dict(), plateau.state_dict()) == before
    assert (torch.optim.lr_scheduler.LRScheduler.step, torch.optim.lr_scheduler.ReduceLROnPlateau.step) == methods


def test_what_another_thread_moves_stays_where_it_went() -> None:
    _, optimizer = network()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    optimizer.step()

    with bystanders_put_back():
        other = threading.Thread(target=scheduler.step)
        other.start()
        other.join()

    assert scheduler.last_epoch == 1
