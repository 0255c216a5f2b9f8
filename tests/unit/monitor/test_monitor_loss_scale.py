"""Under a GradScaler the record has the norms of the gradients themselves, and the scale they carried."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk

QUIET = sk.MonitorConfig(report=False, compact=False)
LIMIT = 0.5
Loop = Literal["replayable", "block", "plain"]


def train(folder: Path, loop: Loop, *, clip: bool, fused: bool = False) -> tuple[pd.DataFrame, list[float]]:
    """Nine steps under a scaler that grows every third; the rows, and the norms before clipping, measured by hand."""
    model = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    norms = []

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        scaler.scale(loss).backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        norms.append(gradients.norm().item() / scaler.get_scale())
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), LIMIT)
        scaler.step(optimizer)
        scaler.update()
        return loss

    with sk.attach(model, optimizer, folder / "run", scaler=scaler, config=QUIET) as monitor:
        watched: Callable[[Tensor], Tensor] = monitor.replayable(step) if loop == "replayable" else step
        for _ in range(9):
            with monitor.step() if loop == "block" else nullcontext():
                watched(torch.randn(4, 8))
    return sk.open_run(folder / "run").steps(), norms


@pytest.mark.parametrize("loop", ["replayable", "block", "plain"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_s_scale_is_the_one_its_gradients_carried(loop: Loop, fused: bool, tmp_path: Path) -> None:
    steps, norms = train(tmp_path, loop, clip=False, fused=fused)

    assert steps["loss_scale"].tolist() == [1024.0] * 3 + [2048.0] * 3 + [4096.0] * 3
    assert steps["grad_norm"].tolist() == pytest.approx(norms, rel=1e-6)
    assert steps["grad_norm_clipped"].tolist() == pytest.approx(norms, rel=1e-6)
    assert steps["clip_coefficient"].tolist() == pytest.approx([1.0] * 9, rel=1e-6)


@pytest.mark.parametrize("loop", ["replayable", "block", "plain"])
def test_the_clip_coefficient_is_a_ratio_of_unscaled_norms(loop: Loop, tmp_path: Path) -> None:
    steps, norms = train(tmp_path, loop, clip=True)

    clipped = [min(norm, LIMIT) for norm in norms]
    assert min(clipped) < max(norms) > LIMIT
    assert steps["grad_norm"].tolist() == pytest.approx(norms, rel=1e-4)
    assert steps["grad_norm_clipped"].tolist() == pytest.approx(clipped, rel=1e-4)
    ratios = [after / before for after, before in zip(clipped, norms, strict=True)]
    assert steps["clip_coefficient"].tolist() == pytest.approx(ratios, rel=1e-4)


def test_a_scaler_that_does_not_tell_its_scale_costs_no_rows(tmp_path: Path) -> None:
    class Silent:
        def state_dict(self) -> dict[str, float]:
            return {}

        def load_state_dict(self, state: dict[str, float]) -> None: ...

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sk.attach(model, optimizer, tmp_path / "run", scaler=Silent(), config=QUIET) as monitor:
        for index in range(2):
            with pytest.warns(RuntimeWarning, match="get_scale") if index == 0 else nullcontext(), monitor.step():
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()

    assert len(sk.open_run(tmp_path / "run").steps()) == 2
