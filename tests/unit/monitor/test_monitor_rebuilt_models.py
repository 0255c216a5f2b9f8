"""Models that change while they are watched: networks frozen in turn, a head that is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.monitor.watched import Watched

EVERY_STEP = sk.MonitorConfig(report=False, compact=False, cadence=1)


def net(depth: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])


def norm_of(module: nn.Module) -> float:
    gradients = [entry.grad for entry in module.parameters() if entry.grad is not None]
    return torch.cat([entry.flatten() for entry in gradients]).norm().item()


@pytest.mark.parametrize("depth", [2, 3], ids=["equal", "unequal"])
def test_networks_that_freeze_each_other_are_both_measured_with_the_hooks_they_have(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, critic = net(2), net(depth)
    model = nn.ModuleDict({"generator": generator, "critic": critic})
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (generator, critic)]
    looked: list[None] = []
    look = Watched._look
    monkeypatch.setattr(Watched, "_look", lambda self: (looked.append(None), look(self)))
    norms = []

    def step(noise: Tensor, turn: int) -> Tensor:
        for index, part in enumerate((generator, critic)):
            part.requires_grad_(index == turn)
            optimizers[index].zero_grad()
        loss = critic(generator(noise)).square().mean() * (1 - 2 * turn)
        loss.backward()
        norms.append(norm_of(model))
        optimizers[turn].step()
        return loss.detach()

    critic.requires_grad_(False)
    with sk.attach(model, optimizers, tmp_path / "run", config=EVERY_STEP) as monitor:
        watched = monitor.replayable(step)
        for index in range(6):
            watched(torch.randn(3, 4), index % 2)

    steps = sk.open_run(tmp_path / "run").steps()
    assert steps["grad_norm"].tolist() == pytest.approx(norms)
    assert len(looked) == 1


@pytest.mark.parametrize("new", [True, False], ids=["a new optimizer", "the same optimizer"])
def test_a_head_that_takes_the_place_of_one_of_the_same_size_is_watched(new: bool, tmp_path: Path) -> None:
    model = net(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(inputs: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    with sk.attach(model, optimizer, tmp_path / "run", config=EVERY_STEP) as monitor:
        watched = monitor.replayable(step)
        watched(torch.randn(3, 4))
        model[1] = nn.Linear(4, 4)
        if new:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        else:
            optimizer.param_groups[0]["params"] = list(model.parameters())
        for _ in range(2):
            watched(torch.randn(3, 4))

    last = sk.open_run(tmp_path / "run").tensors().query("step == 2").set_index(["role", "name"])["l2"]
    assert last["gradient", "1.weight"] == pytest.approx(model[1].weight.grad.norm().item())
    assert last["parameter", "1.weight"] == pytest.approx(model[1].weight.detach().norm().item())
