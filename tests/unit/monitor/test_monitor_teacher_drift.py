"""Drift from stored logits, recorded while a run trains, where the buffer says how its examples become inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk

CONFIG = sk.MonitorConfig(report=False, compact=False, audit_every=2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def filled(model: nn.Module, **extra: Any) -> dict[str, Any]:
    examples = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.eval()(2 * examples)
    model.train()
    return {"examples": examples, "labels": torch.arange(16) % 3, "logits": logits} | extra


def train(model: nn.Sequential, run_dir: Path | None, buffer: dict[str, Any]) -> sk.Run | None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss

    monitor = sk.attach(model, optimizer, run_dir, config=CONFIG, replay_buffer=buffer) if run_dir else None
    run: Callable[[Tensor, Tensor], Tensor | None] = monitor.replayable(step) if monitor else step
    torch.manual_seed(2)
    for _ in range(7):
        run(torch.randn(8, 4), torch.arange(8) % 3)
    if monitor is None:
        return None
    monitor.close()
    return sk.open_run(run_dir)


def double(examples: Tensor) -> Tensor:
    return 2 * examples


def test_drift_grows_from_nothing_and_raises_no_alarm(tmp_path: Path) -> None:
    model = network()

    run = train(model, tmp_path / "run", filled(model, preprocess=double))

    drift = run.buffer().set_index("step")["teacher_drift"]
    assert drift.index.tolist() == [0, 2, 4, 6]
    assert 0 < drift[0] < drift[6]
    assert run.buffer()["drift_slots"].tolist() == [16] * 4
    assert "buffer" not in set(run.events()["kind"])


def test_training_keeps_its_bits(tmp_path: Path) -> None:
    bare, watched = network(), network()

    train(bare, None, {})
    train(watched, tmp_path / "run", filled(watched, preprocess=double))

    pairs = zip(bare.state_dict().values(), watched.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_without_preprocess_the_buffer_is_audited_as_it_is(tmp_path: Path) -> None:
    model = network()

    run = train(model, tmp_path / "run", filled(model))

    assert len(run.buffer()) == 4
    assert run.buffer()["teacher_drift"].isna().all()


def test_a_preprocess_that_fails_is_said_once_and_costs_nothing_but_the_drift(tmp_path: Path) -> None:
    model = network()

    with pytest.warns(RuntimeWarning, match="no such normalisation"):
        run = train(model, tmp_path / "run", filled(model, preprocess=refuse))

    own: pd.DataFrame = run.events().query("message.str.contains('no such normalisation')")
    assert len(run.buffer()) == 4
    assert len(own) == 1


def refuse(examples: Tensor) -> Tensor:
    raise LookupError("no such normalisation")
