"""A step that is undone leaves the weights it found, whatever it is given and whatever the loop around it does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import stabilitykit as sk

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
