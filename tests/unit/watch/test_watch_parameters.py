"""Updates are what the optimizer added, step after step, and what someone else holds stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn


def stepped(watch, model: nn.Linear, optimizer: torch.optim.Optimizer, rate: float) -> torch.Tensor:
    """One step at this learning rate; what it added to the weight."""
    optimizer.param_groups[0]["lr"] = rate
    before = model.weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model.weight.detach() - before


def test_each_recorded_step_has_its_own_update(watched) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    watch = watched(model, optimizer)

    for rate, recording in ((1.0, True), (2.0, True), (4.0, False), (8.0, True)):
        watch.watch.begin(recording=recording, trailing=False)
        added = stepped(watch, model, optimizer, rate)
        watch.watch.update_norm(0)
        updates = {row["name"]: row for row in watch.rows() if row["role"] == "update"}

        assert list(updates) == (["weight", "bias"] if recording else [])
        if recording:
            assert updates["weight"]["l2"] == pytest.approx(added.norm().item(), rel=1e-6)
            assert updates["weight"]["min"] == added.min().item()


def test_a_snapshots_copies_are_read_and_not_written_to(watched) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    watch = watched(model, optimizer)
    held = {name: entry.detach().clone() for name, entry in model.named_parameters()}
    known = {name: entry.clone() for name, entry in held.items()}

    watch.watch.begin_again(held)
    added = stepped(watch, model, optimizer, 1.0)
    norm = watch.watch.update_norm(0)

    assert norm == pytest.approx((added.square().sum() + (model.bias.detach() - known["bias"]).square().sum()).sqrt())
    assert all(torch.equal(held[name], known[name]) for name in known)


def test_a_gradient_that_another_takes_the_place_of_is_measured_again(watched) -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    watch = watched(model, optimizer)

    model(torch.ones(1, 3)).sum().backward()
    model.weight.grad = model.weight.grad * 0.5
    optimizer.step()

    norms = {row["role"]: row["l2"] for row in watch.rows() if row["role"].startswith("gradient")}
    assert norms["gradient_clipped"] == pytest.approx(norms["gradient"] / 2)
