"""Steps that cannot be replayed: which non-finite module buffers are told of."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk

QUIET = sk.MonitorConfig(report=False, compact=False)


class Keeps(nn.Module):
    """A layer with a persistent buffer that the loop writes to."""

    def __init__(self, *, used: bool) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros(4))
        self.layer, self.norm, self.used = nn.Linear(4, 4), nn.BatchNorm1d(4), used

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.layer(x))
        return out + 0 * self.kept if self.used else out


def run(folder: Path, write: Callable[[Keeps], object], *, used: bool = False) -> sk.Monitor:
    """Six steps of a plain loop; before the fourth update something is written."""
    torch.manual_seed(0)
    model = Keeps(used=used)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with sk.attach(model, optimizer, folder / "run", config=QUIET, on_nonfinite="record") as monitor:
        for index in range(6):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            if index == 3:
                with torch.no_grad():
                    write(model)
            optimizer.step()
    return monitor


def test_an_infinity_that_a_module_only_keeps_is_let_pass(tmp_path: Path) -> None:
    monitor = run(tmp_path, lambda model: model.kept[1:].fill_(-math.inf))

    assert monitor.diagnosis is None


def test_it_is_told_of_where_it_does_harm(tmp_path: Path) -> None:
    monitor = run(tmp_path, lambda model: model.kept[1:].fill_(-math.inf), used=True)

    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.step == 4


@pytest.mark.parametrize(
    "write",
    [lambda model: model.kept[1:].fill_(math.nan), lambda model: model.norm.running_var[1:].fill_(math.inf)],
    ids=["nan", "running statistics"],
)
def test_nan_and_running_statistics_are_told_of_at_once(tmp_path: Path, write: Callable[[Keeps], object]) -> None:
    monitor = run(tmp_path, write)

    assert monitor.diagnosis is not None
    assert (monitor.diagnosis.origin.step, monitor.diagnosis.origin.phase) == (3, "state")
