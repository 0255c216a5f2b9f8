import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stabilitykit as sk
from stabilitykit.errors import UsageError
from stabilitykit.guards import (
    BatchNormFreeze,
    GradientClip,
    Guards,
    LearningRateSchedule,
    MixedPrecision,
    StepValidation,
)


class Loop:
    def __init__(self, guards: bool, on_event: object | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.guards = Guards()
        if guards:
            self.guards = Guards(
                learning_rate=LearningRateSchedule(0.05, 2),
                precision=MixedPrecision(),
                batch_norm=BatchNormFreeze(self.model),
                validation=StepValidation(self.model, self.optimizer, policy="skip"),
                clip=GradientClip(100.0),
                on_event=on_event,
            )
        self.train_step = self.guards.protect(self.step)
        self.batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(10)]

    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(inputs), labels)
        loss.backward()
        self.guards.update(self.optimizer, loss)
        return loss.detach()

    def run(self, task: int) -> list[Tensor | None]:
        losses = []
        for batch in self.batches:
            self.guards.begin_step(self.optimizer, task)
            losses.append(self.train_step(*batch))
        self.guards.end_task(task)
        return losses


def test_all_of_them_change_no_bit_of_a_first_task_in_which_nothing_is_wrong() -> None:
    bare, guarded = Loop(guards=False), Loop(guards=True, on_event=lambda kind, message, **data: None)

    losses = bare.run(0), guarded.run(0)

    assert all(map(torch.equal, *losses))
    assert all(map(torch.equal, bare.model.state_dict().values(), guarded.model.state_dict().values()))


def test_each_counts_what_it_did() -> None:
    loop = Loop(guards=True)
    loop.batches[4][0][0, 0] = math.nan

    first, second = loop.run(0), loop.run(1)

    assert [loss is None for loss in first + second].count(True) == 2
    assert loop.guards.counts() == {"lr": 1, "precision": 0, "freeze_bn": 1, "checks": 2, "clip": 0}
    assert loop.optimizer.param_groups[0]["lr"] == 0.025
    assert not loop.model[1].training


def test_events_of_all_reach_a_monitors_record(tmp_path: Path) -> None:
    loop = Loop(guards=True)
    config = sk.MonitorConfig(report=False, compact=False)

    with sk.attach(loop.model, loop.optimizer, tmp_path / "run", config=config, on_nonfinite="record") as monitor:
        loop.guards.listen(monitor)
        loop.batches[4][0][0, 0] = math.nan
        loop.run(0)
    events = sk.open_run(tmp_path / "run").events()

    guards = events[events["kind"] == "guard"]
    assert list(guards["subject"]) == ["checks", "freeze_bn"]
    assert list(guards["severity"]) == ["warning", "info"]


def test_a_state_that_is_put_back_forgets_what_was_counted_since() -> None:
    loop = Loop(guards=True)
    state = loop.guards.state_dict()
    loop.run(0)

    loop.guards.load_state_dict(state)

    assert set(loop.guards.counts().values()) == {0}


def test_a_listener_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(UsageError, match="got on_event=3, expected a Monitor or a callable"):
        GradientClip(1.0, on_event=3)


def test_the_guards_are_there_by_name_and_the_package_alone_loads_no_torch() -> None:
    code = "import sys, stabilitykit as sk; a = 'torch' in sys.modules; print(a, sk.guards.Guards.__name__)"

    printed: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert printed.strip() == "False Guards"
