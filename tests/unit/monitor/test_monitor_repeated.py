"""What is said of a step that goes otherwise when it is run again, and of one that raises for reasons of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk

QUIET = sk.MonitorConfig(report=False, compact=False, replays=2)


class LeaveStep(Exception):
    """A loop's own way out of a step."""


def run(folder: Path, loss_of: Callable[[nn.Module, int], Tensor], num_steps: int = 8) -> sk.Monitor:
    """Steps in which the loss may raise; the caller goes on with the next one."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def train_step(index: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, index)
        loss.backward()
        optimizer.step()
        return loss

    with sk.attach(model, optimizer, folder / "run", config=QUIET, on_nonfinite="record") as monitor:
        step = monitor.replayable(train_step)
        for index in range(num_steps):
            try:
                step(index)
            except LeaveStep:
                continue
    return monitor


def test_a_counter_that_nobody_named_is_what_the_advice_asks_for(tmp_path: Path) -> None:
    calls = 0

    def loss_of(model: nn.Module, _index: int) -> Tensor:
        nonlocal calls
        calls += 1
        return model(torch.ones(2, 3)).mean() / (calls != 5)

    monitor = run(tmp_path, loss_of)

    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.step == 4
    assert "went otherwise" in monitor.diagnosis.remedies[0]
    assert "stateful" in monitor.diagnosis.remedies[0]


@pytest.mark.filterwarnings("ignore:stabilitykit")
def test_a_step_that_refuses_its_repetition_is_quoted(tmp_path: Path) -> None:
    seen = set[int]()

    def loss_of(model: nn.Module, index: int) -> Tensor:
        if index == 4 and index in seen:
            raise OSError("the file is read already")
        seen.add(index)
        return model(torch.ones(2, 3)).mean() / (index != 4)

    monitor = run(tmp_path, loss_of)

    assert monitor.diagnosis is not None
    assert "OSError: the file is read already" in monitor.diagnosis.remedies[0]


def test_a_loop_that_leaves_every_step_by_an_exception_is_looked_into_so_often_and_no_more(tmp_path: Path) -> None:
    runs = list[int]()

    def loss_of(model: nn.Module, index: int) -> Tensor:
        runs.append(index)
        if index:
            raise LeaveStep
        return model(torch.ones(2, 3)).mean()  # type: ignore[no-any-return]

    monitor = run(tmp_path, loss_of)

    assert monitor.diagnosis is None
    assert [runs.count(index) for index in range(3, 8)] == [1] * 5


def test_what_an_untold_object_keeps_is_not_laid_to_the_step_before(tmp_path: Path) -> None:
    kept = torch.zeros(())

    def loss_of(model: nn.Module, index: int) -> Tensor:
        nonlocal kept
        loss = model(torch.ones(2, 3)).mean() + kept
        kept = kept / (index != 3)  # 0 / 0, and used again by the repetition of step 3
        return loss  # type: ignore[no-any-return]

    monitor = run(tmp_path, loss_of)

    assert monitor.diagnosis is not None
    assert (monitor.diagnosis.origin.step, monitor.diagnosis.rule) == (4, "kept_tensor")
