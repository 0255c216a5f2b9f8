"""Of several processes none runs a step again alone: its collectives would meet the others' next ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import stabilitykit as sk

SCRIPT = Path(__file__).with_name("two_ranks.py")
PATIENCE_SECONDS = 60
QUIET = sk.MonitorConfig(report=False, compact=False)


def become_one_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)


def test_a_fault_of_one_rank_leaves_both_in_step_and_training_as_it_was(tmp_path: Path) -> None:
    commands = [[sys.executable, str(SCRIPT), str(rank), str(tmp_path)] for rank in range(2)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]

    try:
        said = [rank.communicate(timeout=PATIENCE_SECONDS)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()

    assert [rank.returncode for rank in ranks] == [0, 0]
    assert json.loads(said[0]) == {"steps": 12, "as_bare": True, "origin": None}
    assert json.loads(said[1]) == {"steps": 12, "as_bare": True, "origin": [7, "hooks"]}
    for rank in range(2):
        events = sk.open_run(tmp_path / f"rank-{rank}").events()
        assert events["kind"].tolist().count("distributed") == 1


@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("late", [False, True])
def test_a_rank_that_would_undo_a_step_alone_is_refused(
    policy: Literal["skip", "rollback"], late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train() -> None:
        with sk.attach(nn.Linear(2, 2), None, tmp_path / "run", on_nonfinite=policy, config=QUIET) as monitor:
            step = monitor.replayable(lambda: None)
            step()
            become_one_of_two(monkeypatch)
            step()

    if not late:
        become_one_of_two(monkeypatch)

    with pytest.raises(
        sk.UsageError, match=f"got on_nonfinite='{policy}' in one of 2 processes, expected raise or rec"
    ):
        train()

    assert (tmp_path / "run").exists() == late


def test_the_error_comes_before_the_update_in_each_function_that_is_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become_one_of_two(monkeypatch)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET) as monitor:
        for _ in range(2):
            train_step = monitor.replayable(step)
            train_step(torch.ones(3, 2))
            with pytest.raises(sk.NonFiniteError, match="known from module hooks") as caught:
                train_step(torch.full((3, 2), torch.nan))
            assert "run the step in a single process" in str(caught.value)
            assert all(parameter.isfinite().all() for parameter in model.parameters())

    run = sk.open_run(tmp_path / "run")
    assert run.steps()["loss"].isna().tolist() == [False, True, False, True]
    assert run.events()["kind"].tolist().count("distributed") == 1
