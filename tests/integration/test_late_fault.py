"""A fault after a thousand steps is found as exactly as one in the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import stabilitykit as sk

LATE = 1_003


def test_a_fault_after_a_thousand_steps_is_named_with_step_sample_and_line(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    config = sk.MonitorConfig(report=False, compact=False)
    with sk.attach(model, optimizer, run_dir=tmp_path / "run", config=config) as monitor:

        @monitor.replayable
        def train_step(inputs: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            optimizer.zero_grad()
            scaled = model(inputs) / scale.unsqueeze(1)  # the line that fails
            loss = scaled.square().mean()
            loss.backward()
            optimizer.step()
            return loss

        for _ in range(LATE):
            train_step(torch.randn(6, 4), torch.rand(6) + 0.5)
        scale = torch.rand(6) + 0.5
        scale[2] = 0

        with pytest.raises(sk.NonFiniteError) as failed:
            train_step(torch.randn(6, 4), scale)

    origin = failed.value.diagnosis.origin
    assert (origin.step, origin.phase, origin.op, origin.proof) == (LATE, "forward", "div", "replayed")
    assert origin.samples == (2,)
    assert origin.code.endswith("# the line that fails")
    assert len(failed.value.diagnosis.run_up) == sk.MonitorConfig().run_up
