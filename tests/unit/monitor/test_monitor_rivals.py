"""Where several values met, the step is run again without each: what that finds, and that it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk

BAD = 3


class Terms(nn.Module):
    """Three terms: the second is infinite in every step and left out, the third where its scale is large."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.unused = nn.Identity()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y = self.layer(x)
        unused = self.unused(1 / torch.zeros(()) * y.detach().square().mean())
        terms = torch.stack([y.mean(), unused, y.square().mean() * scale.exp()])
        return torch.where(torch.tensor([True, False, True]), terms, 0.0).sum()


def run(run_dir: Path | None, policy: str = "record") -> tuple[nn.Module, sk.Diagnosis | None]:
    torch.manual_seed(0)
    model = Terms()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def train_step(x: Tensor, scale: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x, scale)
        loss.backward()
        optimizer.step()
        return loss

    batches = [(torch.randn(6, 4), torch.tensor(200.0 if step == BAD else 1.0)) for step in range(BAD + 1)]
    if run_dir is None:
        for batch in batches:
            train_step(*batch)
        return model, None
    with sk.attach(model, optimizer, run_dir, config="full", on_nonfinite=policy) as monitor:
        step = monitor.replayable(train_step)
        for batch in batches:
            step(*batch)
    return model, monitor.diagnosis


def test_the_origin_is_the_value_that_does_harm_alone(tmp_path: Path) -> None:
    _, diagnosis = run(tmp_path / "run")

    assert diagnosis is not None
    assert (diagnosis.origin.step, diagnosis.origin.op) == (BAD, "exp")
    assert diagnosis.origin.proof == "replayed"


def test_training_goes_on_as_if_nothing_had_been_tried(tmp_path: Path) -> None:
    bare, _ = run(None)
    watched, _ = run(tmp_path / "run")

    for expected, got in zip(bare.parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected.nan_to_num(7.0), got.nan_to_num(7.0))


@pytest.mark.parametrize("step", range(BAD + 1))
def test_the_record_holds_what_the_step_gave_and_not_what_was_tried(step: int, tmp_path: Path) -> None:
    run(tmp_path / "run")

    rows = sk.open_run(tmp_path / "run").tensors(name="unused", role="output", steps=range(step, step + 1))

    assert list(rows.posinf) == [1]


def test_a_skipped_step_is_undone(tmp_path: Path) -> None:
    model, diagnosis = run(tmp_path / "run", policy="skip")

    assert diagnosis is not None
    assert all(parameter.isfinite().all() for parameter in model.parameters())
