"""How many copies of the training state a diagnosis holds at once."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.snapshot import Snapshot

BAD = 3


def snapshots() -> list[Snapshot]:
    """All that there are in the process."""
    return [entry for entry in gc.get_objects() if type(entry) is Snapshot]


def most_copies(run_dir: Path, config: sk.MonitorConfig) -> int:
    """The largest number of snapshots there are whenever the bad step runs."""
    model = nn.Linear(4, 200)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    found = [0]
    earlier = snapshots()  # an exception that another test keeps may lead to some

    def train_step(x: Tensor) -> Tensor:
        if not x.any():
            found.append(len(snapshots()) - len(earlier))
        optimizer.zero_grad()
        loss: Tensor = (model(x) / x.abs().sum()).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    with sk.attach(model, optimizer, run_dir, config=config, on_nonfinite="skip") as monitor:
        step = monitor.replayable(train_step)
        for number in range(BAD + 1):
            step(torch.zeros(3, 4) if number == BAD else torch.randn(3, 4))
    assert monitor.diagnosis is not None
    return max(found)


@pytest.mark.parametrize(("history_bytes", "copies"), [(1 << 26, 3), (1024, 2)])
def test_a_state_that_is_large_is_held_twice_at_most(tmp_path: Path, history_bytes: int, copies: int) -> None:
    config = sk.MonitorConfig(snapshot_every=10, history_bytes=history_bytes)

    assert most_copies(tmp_path / "run", config) == copies
