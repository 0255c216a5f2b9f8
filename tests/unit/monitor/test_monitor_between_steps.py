"""What runs between steps, or in a step that is broken off, is nobody's row."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk

EVERY_STEP = sk.MonitorConfig(report=False, compact=False, cadence=1)


class Loop:
    """A loop that evaluates, and is interrupted in its second step."""

    def __init__(self) -> None:
        self.model = nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)

    def train(self, inputs: Tensor, error: BaseException | None = None) -> None:
        self.optimizer.zero_grad()
        self.model(inputs).square().mean().backward()
        if error is not None:
            raise error
        self.optimizer.step()

    def evaluate(self) -> None:
        with torch.no_grad():
            self.model(torch.full((3, 4), 1000.0))


def in_blocks(loop: Loop, monitor: sk.Monitor) -> Callable[..., object]:
    def step(*args: object) -> None:
        with monitor.step():
            loop.train(*args)

    return step


def wrapped(loop: Loop, monitor: sk.Monitor) -> Callable[..., object]:
    return monitor.replayable(loop.train)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a bad batch")], ids=["interrupt", "error"])
@pytest.mark.parametrize("how", [in_blocks, wrapped])
def test_a_step_has_the_rows_of_its_own_forwards_alone(how: Callable, error: BaseException, tmp_path: Path) -> None:
    loop = Loop()

    with sk.attach(loop.model, loop.optimizer, tmp_path / "run", config=EVERY_STEP) as monitor:
        loop.evaluate()
        step = how(loop, monitor)
        step(torch.ones(3, 4))
        loop.evaluate()
        with suppress(KeyboardInterrupt, ValueError):
            step(torch.full((3, 4), 1000.0), error)
        loop.evaluate()
        step(torch.ones(3, 4))

    rows = sk.open_run(tmp_path / "run").tensors(role="output")
    sound = rows[rows["max"] < 100]
    assert sound["step"].tolist() == [0, rows["step"].max()]
    assert set(sound["call"]) == {0}
    assert len(rows) - len(sound) == (how is wrapped and isinstance(error, ValueError))  # a step that raised is a step
