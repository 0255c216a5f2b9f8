"""A replayed step traced: the place that is named, and the non-finite values that are no fault."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad as _grad
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import stabilitykit as sk

QUIET = sk.MonitorConfig(report=False, compact=False)


class Network(nn.Module):
    """A body, and a head that the test gives."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), head

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


class Applying(nn.Module):
    """Applies a function; its own parameter, so that it is no empty module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.gain = function, nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs * self.gain)


def diagnose(
    model: nn.Module,
    run_dir: Path,
    *batches: Any,
    loss: Callable[[Tensor], Tensor] = lambda output: output.mean(),
    optimizer: Optimizer | None = None,
) -> sk.Diagnosis | None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)

    def train_step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = loss(model(batch))
        value.backward()
        optimizer.step()
        return value

    with sk.attach(model, optimizer, run_dir, config=QUIET, on_nonfinite="record") as monitor:
        step = monitor.replayable(train_step)
        for batch in batches or (torch.randn(3, 4),):
            step(batch)
    return monitor.diagnosis


def line_of(function: Any, text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(index for index, line in enumerate(lines) if text in line)


def test_the_innermost_module_and_the_users_line_are_named(tmp_path: Path) -> None:
    def vanish(x: Tensor) -> Tensor:
        return (x * 0).log()  # here

    diagnosis = diagnose(Network(nn.Sequential(nn.ReLU(), Applying(vanish))), tmp_path / "run")

    origin = diagnosis.origin
    assert (origin.phase, origin.module, origin.op, origin.kind) == ("forward", "head.1", "log", "inf")
    assert (origin.line, origin.code) == (line_of(vanish, "# here"), "return (x * 0).log()  # here")
    assert diagnosis.chain[0].op == "log"


def test_inside_a_built_in_the_module_is_the_built_ins_and_the_line_the_callers(tmp_path: Path) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = torch.ones(3, 2, dtype=torch.bool)
            sequence = inputs[:, None].expand(3, 2, 4)
            return self.attention(sequence, sequence, sequence, key_padding_mask=hidden)[0]  # all hidden

    diagnosis = diagnose(Network(Attending()), tmp_path / "run")

    assert "softmax" in diagnosis.origin.op
    assert diagnosis.origin.module == "head.attention"
    assert diagnosis.origin.code.endswith("# all hidden")


class Sloppy(torch.autograd.Function):
    """Its own backward divides by zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / (gradient * 0)  # by zero


def test_a_custom_functions_backward_is_named_with_its_own_line(tmp_path: Path) -> None:
    diagnosis = diagnose(Network(Applying(Sloppy.apply)), tmp_path / "run")

    origin = diagnosis.origin
    assert (origin.phase, origin.op) == ("backward", "div")
    assert origin.line == line_of(Sloppy.backward, "# by zero")


def test_a_derivative_is_told_by_the_forward_operation_and_its_line(tmp_path: Path) -> None:
    def root(x: Tensor) -> Tensor:
        return (x * 0).sqrt()  # at zero

    diagnosis = diagnose(Network(Applying(root)), tmp_path / "run")

    origin = diagnosis.origin
    assert (origin.phase, origin.op, origin.module) == ("backward", "sqrt", "head")
    assert origin.line == line_of(root, "# at zero")


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing_the_first_forward_is_named_not_the_second(reentrant: bool, tmp_path: Path) -> None:
    def vanish(x: Tensor) -> Tensor:
        return (x * 0).log()  # inside the segment

    model = Network(Applying(lambda x: checkpoint(vanish, x, use_reentrant=reentrant)))

    diagnosis = diagnose(model, tmp_path / "run")

    assert (diagnosis.origin.phase, diagnosis.origin.op) == ("forward", "log")
    assert diagnosis.origin.line == line_of(vanish, "# inside the segment")


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_the_parameter_whose_update_went_wrong_is_named_in_every_implementation(
    options: dict[str, bool], tmp_path: Path
) -> None:
    model = Network(nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), eps=0.0, **options)

    diagnosis = diagnose(
        model, tmp_path / "run", loss=lambda output: output[:, 0].sum() + 0 * output[:, 1].sum(), optimizer=optimizer
    )

    origin = diagnosis.origin
    assert (origin.phase, origin.kind) == ("optimizer", "nan")
    assert origin.tensor in ("head.weight", "head.bias")
    assert origin.module == "head"


def test_the_rows_of_the_batch_that_caused_it_are_named(tmp_path: Path) -> None:
    batch = torch.ones(5, 4)
    batch[1, 2] = math.inf
    batch[3] = math.nan

    diagnosis = diagnose(Network(nn.ReLU()), tmp_path / "run", torch.ones(5, 4), batch)

    assert (diagnosis.origin.phase, diagnosis.origin.tensor, diagnosis.origin.step) == ("data", "batch", 1)
    assert diagnosis.origin.samples == (1, 3)


def test_an_inf_that_is_clamped_away_is_not_the_origin_of_a_later_nan(tmp_path: Path) -> None:
    def function(x: Tensor) -> Tensor:
        bounded = (x.detach() * 1e38 * 1e38).clamp(-1, 1)  # harmless
        return bounded + x / (x * 0).detach()  # the fault

    diagnosis = diagnose(Network(Applying(function)), tmp_path / "run")

    assert diagnosis.origin.code.endswith("# the fault")


def test_an_inf_first_and_a_nan_later_is_told_at_the_inf(tmp_path: Path) -> None:
    def function(x: Tensor) -> Tensor:
        large = (x.abs() + 100).exp()  # first
        return large - large  # later

    diagnosis = diagnose(Network(Applying(function)), tmp_path / "run")

    assert (diagnosis.origin.op, diagnosis.origin.kind) == ("exp", "inf")
    assert [link.op for link in diagnosis.chain][:2] == ["exp", "sub"]


# No false alarm.

MASK = torch.tensor([[False, True, False, True]])


class Minimum(nn.Module):
    """A running minimum that starts at inf."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lowest", torch.full((4,), math.inf))

    def forward(self, inputs: Tensor) -> Tensor:
        self.lowest.copy_(torch.minimum(self.lowest, inputs.detach().amin(0)))
        return inputs - self.lowest.clamp(max=10.0)


def with_marker(x: Tensor) -> Tensor:
    target = torch.tensor([1.0, math.nan, 2.0])  # NaN marks what is missing
    known = ~target.isnan()
    return (x[:, 0] - target)[known].square()


def with_metric(x: Tensor) -> Tensor:
    with torch.no_grad():
        accuracy = (x > 100).float().sum() / (x > 100).sum()
        assert accuracy.isnan()
    return x


HEALTHY: dict[str, Callable[[], nn.Module]] = {
    "an attention mask of -inf": lambda: Applying(lambda x: x.masked_fill(MASK, -math.inf).softmax(-1)),
    "a mask added from a literal": lambda: Applying(lambda x: (x + torch.tensor([0, -math.inf, 0, 0])).softmax(-1)),
    "a logsumexp over -inf": lambda: Applying(lambda x: x.masked_fill(MASK, -math.inf).logsumexp(-1)),
    "a causal attention": lambda: Applying(
        lambda x: nn.functional.scaled_dot_product_attention(x[None], x[None], x[None], is_causal=True)
    ),
    "a running minimum that starts at inf": Minimum,
    "nan as a marker for missing targets": lambda: Applying(with_marker),
    "a metric of 0 / 0 without gradient": lambda: Applying(with_metric),
    "an inf that is clamped": lambda: Applying(lambda x: (x * 1e38 * 1e38).detach().clamp(-1, 1) + x),
    "an inf that relu takes away": lambda: Applying(lambda x: (-x.detach().abs() * 1e38 * 1e38).relu() + x),
    "an unused branch of where": lambda: Applying(lambda x: torch.where(x > 1e9, (x.detach() * 0).log(), x)),
    "a maximum from -inf": lambda: Applying(lambda x: torch.maximum(x, torch.full_like(x, -math.inf))),
}


@pytest.mark.parametrize("head", HEALTHY.values(), ids=HEALTHY)
def test_a_non_finite_value_that_does_no_harm_is_no_fault(head: Callable[[], nn.Module], tmp_path: Path) -> None:
    batches = [torch.randn(3, 4) for _ in range(3)]

    assert diagnose(Network(head()), tmp_path / "run", *batches) is None


def test_a_metric_with_a_gradient_is_looked_into_a_few_times_and_then_taken_for_one(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replays = 0

    def train_step(batch: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal replays
        replays += monitor.replaying
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss, (loss * 0).log()

    config = sk.MonitorConfig(report=False, compact=False, snapshot_every=1)
    with sk.attach(model, optimizer, tmp_path / "run", config=config) as monitor:
        step = monitor.replayable(train_step)
        for _ in range(6):
            step(torch.ones(3, 2))

    assert monitor.diagnosis is None
    assert 3 <= replays <= 6  # a replay may run the step before as well


@pytest.mark.parametrize("asked", [torch.autograd.grad, _grad], ids=["by its full name", "under a name of its own"])
def test_what_is_reckoned_from_gradients_that_were_asked_for_is_told_by_where_it_goes(
    asked: Callable[..., Any], tmp_path: Path
) -> None:
    model = nn.Linear(4, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def clip(batch: Tensor) -> None:
        (gradient,) = asked(model(batch).sum() * 0, model.weight)
        model.weight.grad = gradient / gradient.norm()
        optimizer.step()

    def update(batch: Tensor) -> None:
        (gradient,) = asked(model(batch).sum() * 0, model.weight)
        with torch.no_grad():
            model.weight -= gradient / gradient.norm()

    def weigh(batch: Tensor) -> None:
        (gradient,) = asked(model(batch).sum() * 0, model.weight)
        (model(batch).sum() / gradient.norm()).backward()
        optimizer.step()

    found = [run_once(step, model, optimizer, tmp_path / step.__name__) for step in (clip, update, weigh)]

    assert [origin.phase for origin in found] == ["clip", "optimizer", "forward"]
    assert [origin.tensor for origin in found] == ["weight", "weight", ""]
    assert {origin.op for origin in found} == {"div"}


def run_once(step: Callable[[Tensor], None], model: nn.Module, optimizer: Optimizer, run_dir: Path) -> sk.Origin:
    with torch.no_grad():
        model.weight.fill_(1.0)
    with sk.attach(model, optimizer, run_dir, config=QUIET, on_nonfinite="record") as monitor:
        monitor.replayable(step)(torch.ones(3, 4))
    return monitor.diagnosis.origin


def test_a_metric_of_nan_that_is_returned_beside_the_loss_is_no_fault(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(batch: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss, torch.zeros(()) / 0

    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET) as monitor:
        step = monitor.replayable(train_step)
        for _ in range(3):
            step(torch.ones(3, 2))

    assert monitor.diagnosis is None
    assert monitor.step_index == 3
