"""Each rule explains the fault it is for, from a real step; and the step that takes the advice has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import stabilitykit as sk
from stabilitykit.diagnose.rules import RULES

pytestmark = pytest.mark.filterwarnings("ignore:std")  # torch warns of the very fault that is planted
QUIET = sk.MonitorConfig(report=False, compact=False)


class Model(nn.Module):
    """A weight of ones, a buffer, a BatchNorm."""

    def __init__(self, weight: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), weight, dtype=dtype))
        self.register_buffer("scale", torch.ones(()))
        self.norm = nn.BatchNorm1d(1)


Loss = Callable[[Model, Tensor], Tensor]


@dataclass(frozen=True)
class Fault:
    """One step that goes wrong: what it computes, from which batch, and how it is optimised."""

    loss: Loss
    batch: tuple[float, ...] = (1.0, 2.0, 0.0, 3.0)
    dtype: torch.dtype = torch.float32
    weight: float = 1.0
    optimizer: Callable[..., Optimizer] = torch.optim.SGD
    options: Mapping[str, Any] = field(default_factory=lambda: {"lr": 0.1})
    clip: Callable[[Tensor], Tensor] | None = None
    buffer: Mapping[str, Tensor] | None = None
    steps: int = 1

    def diagnose(self, run_dir: Path) -> sk.Diagnosis | None:
        model = Model(self.weight, self.dtype)
        optimizer = self.optimizer(model.parameters(), **self.options)

        def train_step(batch: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(model, batch)
            loss.backward()
            if self.clip is not None:
                model.weight.grad.copy_(self.clip(model.weight.grad))
            optimizer.step()
            return loss

        batch = torch.tensor(self.batch, dtype=self.dtype)
        with sk.attach(
            model, optimizer, run_dir, config=QUIET, on_nonfinite="record", replay_buffer=self.buffer
        ) as monitor:
            step = monitor.replayable(train_step)
            for _ in range(self.steps):
                step(batch)
                if monitor.diagnosis is not None:
                    break
        return monitor.diagnosis


KEPT = {"statistic": torch.tensor(math.nan)}
MEMORY = {"examples": torch.tensor([[1.0] * 4, [math.nan] * 4]), "labels": torch.tensor([0, 1])}


def weighted(model: Model, x: Tensor) -> Tensor:
    return (model.weight * x).sum()


def with_norm(model: Model, x: Tensor) -> Tensor:
    return (model.norm(x[:, None])[:, 0] * model.weight).sum()


def masked(model: Model, x: Tensor, hidden: Tensor) -> Tensor:
    return ((model.weight * x).masked_fill(hidden, -math.inf).softmax(-1) * x).sum()


def alignment(model: Model, x: Tensor, *, zero_infinity: bool) -> Tensor:
    """CTC of three labels over two frames."""
    frames = (model.weight * x).expand(2, 1, 4).log_softmax(-1)
    return nn.functional.ctc_loss(frames, torch.tensor([[1, 2, 3]]), (2,), (3,), zero_infinity=zero_infinity)


def unit(gradient: Tensor) -> Tensor:
    return gradient / gradient.norm()


def unit_guarded(gradient: Tensor) -> Tensor:
    return gradient / gradient.norm().clamp_min(1e-6)


def solved(model: Model, matrix: Tensor) -> Tensor:
    return torch.linalg.solve_ex(matrix, model.weight)[0].sum()


def unwritten(model: Model, x: Tensor, rows: int) -> Tensor:
    """Memory as torch.empty gives it out, which deterministic mode fills with NaN; `rows` of it are written."""
    torch.use_deterministic_algorithms(True)
    try:
        table = torch.empty(4)
    finally:
        torch.use_deterministic_algorithms(False)
    table[:rows] = (model.weight * x)[:rows]
    return table.sum()


def logarithm(values: Tensor) -> Tensor:
    with np.errstate(invalid="ignore", divide="ignore"):
        return torch.from_numpy(np.log(values.numpy()))


class Weighed(torch.autograd.Function):
    """Its backward weighs the gradient with what forward was given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient * weight, None


# name of the rule: the fault it explains, and the same step with its advice taken
FAULTS: Mapping[str, tuple[Fault, Fault]] = {
    "number_not_finite": (
        Fault(lambda m, x: weighted(m, x) * math.nan),
        Fault(lambda m, x: weighted(m, x) * 0.5),
    ),
    "kept_tensor": (
        Fault(lambda m, x: weighted(m, x * KEPT["statistic"])),
        Fault(lambda m, x: weighted(m, x * KEPT["statistic"].nan_to_num())),
    ),
    "made_in_python": (
        Fault(lambda m, x: weighted(m, logarithm(x - 10))),
        Fault(lambda m, x: weighted(m, logarithm((x - 10).clamp(min=1e-3)))),
    ),
    "uninitialised_memory": (
        Fault(lambda m, x: unwritten(m, x, 3)),
        Fault(lambda m, x: unwritten(m, x, 4)),
    ),
    "bad_sample": (
        Fault(weighted, batch=(1.0, math.nan, 2.0, 3.0)),
        Fault(lambda m, x: weighted(m, x.nan_to_num()), batch=(1.0, math.nan, 2.0, 3.0)),
    ),
    "bad_buffer_entry": (
        Fault(lambda m, x: weighted(m, x + MEMORY["examples"][torch.tensor([1])][0]), buffer=MEMORY),
        Fault(lambda m, x: weighted(m, x + MEMORY["examples"][torch.tensor([0])][0]), buffer=MEMORY),
    ),
    "bad_weights": (Fault(weighted, weight=math.nan), Fault(weighted)),
    "running_statistics": (
        Fault(with_norm, batch=(1e25, -1e25, 1e25, -1e25)),
        Fault(lambda m, x: with_norm(m, x.clamp(-1e4, 1e4)), batch=(1e25, -1e25, 1e25, -1e25)),
    ),
    "lr_not_finite": (Fault(weighted, options={"lr": math.nan}), Fault(weighted, options={"lr": 0.1})),
    "divergence": (
        Fault(lambda m, x: m.weight.square().sum(), options={"lr": 3.0}, steps=80),
        Fault(lambda m, x: m.weight.square().sum(), options={"lr": 0.3}, steps=80),
    ),
    "fully_masked_softmax": (
        Fault(lambda m, x: masked(m, x, x > -1)),
        Fault(lambda m, x: masked(m, x, x > 1)),
    ),
    "empty_reduction": (
        Fault(lambda m, x: (m.weight * x)[x > 100].mean()),
        Fault(lambda m, x: (m.weight * x)[x > 100].sum() / (x > 100).sum().clamp_min(1)),
    ),
    "single_sample_variance": (
        Fault(lambda m, x: (m.weight * x)[:1].std()),
        Fault(lambda m, x: ((m.weight * x)[:1].var(correction=0) + 1e-8).sqrt()),
    ),
    "clip_by_zero_norm": (
        Fault(lambda m, x: (m.weight * 0).sum(), clip=unit),
        Fault(lambda m, x: (m.weight * 0).sum(), clip=unit_guarded),
    ),
    "derivative_at_edge": (
        Fault(lambda m, x: (m.weight * x).sqrt().sum()),
        Fault(lambda m, x: (m.weight * x + 1e-12).sqrt().sum()),
    ),
    "where_trap": (
        Fault(lambda m, x: torch.where(x > 0, (m.weight * x).sqrt(), 0).sum()),
        Fault(lambda m, x: torch.where(x > 0, torch.where(x > 0, m.weight * x, 1).sqrt(), 0).sum()),
    ),
    "inf_arithmetic": (
        Fault(lambda m, x: (m.weight * x * torch.full_like(x, math.inf)).sum()),
        Fault(lambda m, x: (m.weight * x).masked_fill(x > 1, -math.inf).exp().sum()),
    ),
    "placed_infinity": (
        Fault(lambda m, x: (m.weight * x).masked_fill(x > -1, math.inf).amin()),
        Fault(lambda m, x: (m.weight * x).masked_fill(x > 1, math.inf).amin()),
    ),
    "singular_matrix": (
        Fault(lambda m, x: solved(m, torch.zeros(4, 4) * m.weight)),
        Fault(lambda m, x: solved(m, torch.zeros(4, 4) * m.weight + torch.eye(4))),
    ),
    "impossible_target": (
        Fault(lambda m, x: alignment(m, x, zero_infinity=False)),
        Fault(lambda m, x: alignment(m, x, zero_infinity=True)),
    ),
    "normalised_constant": (
        Fault(lambda m, x: nn.functional.layer_norm(m.weight * 1.0, (4,), eps=0.0).sum()),
        Fault(lambda m, x: nn.functional.layer_norm(m.weight * 1.0, (4,), eps=1e-5).sum()),
    ),
    "equal_eigenvalues": (
        Fault(lambda m, x: torch.linalg.eigh(torch.diag(m.weight))[1].sum()),
        Fault(lambda m, x: torch.linalg.eigvalsh(torch.diag(m.weight)).sum()),
    ),
    "overshoot": (
        Fault(lambda m, x: weighted(m, x).square(), options={"lr": 1e12}, steps=4),
        Fault(lambda m, x: weighted(m, x).square(), options={"lr": 1e-3}, steps=4),
    ),
    "log_domain": (
        Fault(lambda m, x: (m.weight * x).log().sum()),
        Fault(lambda m, x: (m.weight * x).clamp_min(1e-12).log().sum()),
    ),
    "division_by_zero": (
        Fault(lambda m, x: (m.weight / x).sum()),
        Fault(lambda m, x: (m.weight / x.clamp_min(1e-8)).sum()),
    ),
    "outside_domain": (
        Fault(lambda m, x: (m.weight * x + 0.5).acos().sum()),
        Fault(lambda m, x: (m.weight * x + 0.5).clamp(-1 + 1e-6, 1 - 1e-6).acos().sum()),
    ),
    "pole": (
        Fault(lambda m, x: (m.weight * x).pow(-0.5).sum()),
        Fault(lambda m, x: (m.weight * x).clamp_min(1e-6).pow(-0.5).sum()),
    ),
    "loss_scale": (
        Fault(lambda m, x: weighted(m, x).float() * 1e6, dtype=torch.float16),
        Fault(lambda m, x: weighted(m, x).float() * 1e3, dtype=torch.float16, options={"lr": 1e-5}),
    ),
    "narrow_overflow": (
        Fault(lambda m, x: (m.weight * x * 300 * 300).sum(), dtype=torch.float16),
        Fault(lambda m, x: (m.weight.float() * x * 300 * 300).sum() / 1e4, dtype=torch.float16),
    ),
    "exp_overflow": (
        Fault(lambda m, x: (m.weight * x * 100).exp().sum()),
        Fault(lambda m, x: (m.weight * x * 100).clamp(max=20).exp().sum()),
    ),
    "overflow": (
        Fault(lambda m, x: (m.weight * x).square().mean(), batch=(1e30, 1.0, 1.0, 1.0)),
        Fault(
            lambda m, x: nn.functional.smooth_l1_loss(m.weight * x, torch.zeros(4)),
            batch=(1e30, 1.0, 1.0, 1.0),
            options={"lr": 1e-30},
        ),
    ),
    "setting_not_finite": (
        Fault(weighted, options={"lr": 0.1, "weight_decay": math.nan}),
        Fault(weighted, options={"lr": 0.1, "weight_decay": 0.01}),
    ),
    "optimizer_eps": (
        Fault(lambda m, x: (m.weight * 0).sum(), optimizer=torch.optim.Adam, options={"eps": 0.0}),
        Fault(lambda m, x: (m.weight * 0).sum(), optimizer=torch.optim.Adam, options={"eps": 1e-8}),
    ),
    "update_overflow": (
        Fault(lambda m, x: weighted(m, x) * 1e3, options={"lr": 1e38}),
        Fault(lambda m, x: weighted(m, x) * 1e3, options={"lr": 1e-3}),
    ),
}


def test_every_rule_but_those_with_a_test_of_their_own_is_in_the_table() -> None:
    assert {rule.name for rule in RULES} - {"bad_state", "bad_optimizer_state"} == set(FAULTS)


@pytest.mark.parametrize("name", FAULTS)
def test_the_rule_explains_its_fault(name: str, tmp_path: Path) -> None:
    fault, _ = FAULTS[name]

    diagnosis = fault.diagnose(tmp_path / "run")

    assert diagnosis is not None
    assert diagnosis.rule == name
    assert diagnosis.cause
    assert diagnosis.remedies


@pytest.mark.parametrize("name", FAULTS)
def test_the_step_that_takes_the_advice_is_healthy(name: str, tmp_path: Path) -> None:
    _, healed = FAULTS[name]

    assert healed.diagnose(tmp_path / "run") is None


def test_a_buffer_that_was_bad_when_the_step_began_is_explained_as_such(tmp_path: Path) -> None:
    model = Model(1.0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step() -> Tensor:
        optimizer.zero_grad()
        loss = (model.weight * model.scale).sum()
        loss.backward()
        optimizer.step()
        return loss

    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET, on_nonfinite="record") as monitor:
        step = monitor.replayable(train_step)
        step()
        model.scale.fill_(math.nan)  # between two steps
        step()

    assert monitor.diagnosis is not None
    assert (monitor.diagnosis.rule, monitor.diagnosis.origin.tensor) == ("bad_state", "scale")


@pytest.mark.parametrize("rate", [math.nan, torch.tensor(math.nan)])
def test_a_learning_rate_counts_as_it_was_at_the_update_and_not_as_the_step_left_it(rate: Any, tmp_path: Path) -> None:
    model = Model(1.0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = torch.optim.SGD(model.parameters(), lr=0.2)

    def train_step() -> Tensor:
        optimizer.zero_grad()
        loss = model.weight.sum()
        loss.backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.1
        other.step()
        return loss

    with sk.attach(model, [optimizer, other], tmp_path / "run", config=QUIET, on_nonfinite="record") as monitor:
        monitor.replayable(train_step)()

    assert monitor.diagnosis is not None
    assert monitor.diagnosis.rule == "lr_not_finite"
    assert "lr = nan" in monitor.diagnosis.cause


def test_an_optimizer_state_that_was_bad_when_the_step_began_is_explained_as_such(tmp_path: Path) -> None:
    model = Model(1.0, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)

    def train_step() -> Tensor:
        optimizer.zero_grad()
        loss = model.weight.sum()
        loss.backward()
        optimizer.step()
        return loss

    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET, on_nonfinite="record") as monitor:
        step = monitor.replayable(train_step)
        step()
        optimizer.state[model.weight]["exp_avg"].fill_(math.nan)  # between two steps
        step()

    assert monitor.diagnosis is not None
    assert (monitor.diagnosis.rule, monitor.diagnosis.origin.tensor) == ("bad_optimizer_state", "weight")


NEIGHBOURS: dict[str, tuple[Fault, str]] = {
    "a mask times a number of -inf is arithmetic with an Inf": (
        Fault(lambda m, x: (m.weight * (x > 1) * -math.inf).sum()),
        "inf_arithmetic",
    ),
    "a derivative that is nan by itself was not masked": (
        Fault(lambda m, x: torch.view_as_complex((m.weight * x).view(2, 2)).angle().sum(), batch=(1e-25,) * 4),
        "derivative_at_edge",
    ),
    "a singular factor's derivative was not masked": (
        Fault(lambda m, x: torch.linalg.cholesky_ex(torch.diag(m.weight * x))[0].diagonal()[:2].sum()),
        "singular_matrix",
    ),
    "a weight of backward's own gradient was not masked": (
        Fault(lambda m, x: Weighed.apply(m.weight, 1 / x).sum()),
        "division_by_zero",
    ),
    "a layer norm whose variance overflows was not given a constant": (
        Fault(lambda m, x: nn.functional.layer_norm(m.weight * x, (4,)).sum(), batch=(1e30, 1.0, 1.0, 1.0)),
        "overflow",
    ),
    "a power of a moderate number can overflow": (
        Fault(lambda m, x: (m.weight * x).pow(20).sum(), batch=(300.0, 1.0, 1.0, 1.0)),
        "overflow",
    ),
    "a square that overflows is not outside its domain": (FAULTS["overflow"][0], "overflow"),
    "a log that was masked fails in its derivative": (
        Fault(lambda m, x: torch.where(x > 0, (m.weight * x).log(), 0).sum()),
        "where_trap",
    ),
    "a plain derivative at the edge is no where-trap": (FAULTS["derivative_at_edge"][0], "derivative_at_edge"),
    "a log of zero in half precision did not overflow": (
        Fault(lambda m, x: (m.weight * x).log().sum(), dtype=torch.float16),
        "log_domain",
    ),
    "a softmax of a bad sample is not fully masked": (
        Fault(lambda m, x: (m.weight * x).softmax(-1)[0], batch=(1.0, math.nan, 2.0, 3.0)),
        "bad_sample",
    ),
    "an overflow without growth is no divergence": (
        Fault(lambda m, x: (m.weight * x).square().mean(), batch=(1e30, 1.0, 1.0, 1.0), steps=4),
        "overflow",
    ),
    "a mean over something that is nan already is not empty": (
        Fault(lambda m, x: (m.weight * x).mean(), batch=(math.nan, 1.0, 1.0, 1.0)),
        "bad_sample",
    ),
    "a sum that overflows to inf by division with a tiny number is not a division by zero": (
        Fault(lambda m, x: (m.weight * 1e20 / x).sum(), batch=(1e-30, 1.0, 1.0, 1.0)),
        "overflow",
    ),
    "an update of Adam with an epsilon that overflows is not for want of it": (
        Fault(weighted, batch=(1e-3,) * 4, weight=-3.39e38, optimizer=torch.optim.Adam, options={"lr": 3e37}),
        "update_overflow",
    ),
}


def hooked(model: Model, x: Tensor) -> Tensor:
    """A hook divides the gradient of an activation by its norm, which is 0."""
    activation = model.weight * x
    activation.register_hook(unit)
    return (activation * 0).sum()


def buffered(model: Model, x: Tensor) -> Tensor:
    """A buffer becomes 0 / 0 and is not used yet."""
    model.scale.copy_((x[2] / x[2]).detach())
    return weighted(model, x)


def drifting(model: Model, x: Tensor) -> Tensor:
    """A loss that falls along one gradient, always the same, whose variance is below 0 by rounding."""
    return 12345.678 * model.weight.sum()


NEIGHBOURS |= {
    "a cast that overflows before a tanh was not masked": (
        Fault(lambda m, x: (m.weight * torch.tensor([70_000] * 4).to(x.dtype)).tanh().sum(), dtype=torch.float16),
        "narrow_overflow",
    ),
    "a hook's own division is no derivative": (Fault(hooked), "division_by_zero"),
    "a count of 0 divides by zero though it is an integer": (
        Fault(lambda m, x: (m.weight * 0).sum() / (x > 100).sum()),
        "division_by_zero",
    ),
    "a weight without a direction is divided by its norm of 0": (
        Fault(lambda m, x: torch._weight_norm(m.weight[None] * 0, m.weight[:1, None]).sum()),
        "division_by_zero",
    ),
    "a buffer of 0 / 0 did not overflow": (Fault(buffered), "division_by_zero"),
    "the deviation of one gradient is no norm of 0": (
        Fault(weighted, clip=lambda gradient: gradient * gradient[:1].std()),
        "single_sample_variance",
    ),
    "a variance below 0 is no divergence": (
        Fault(
            drifting,
            optimizer=torch.optim.RMSprop,
            options={"lr": 1e-4, "alpha": 0.5, "centered": True},
            steps=60,
        ),
        "outside_domain",
    ),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_rule_leaves_its_neighbours_faults_alone(name: str, tmp_path: Path) -> None:
    fault, rule = NEIGHBOURS[name]

    diagnosis = fault.diagnose(tmp_path / "run")

    assert diagnosis is not None
    assert diagnosis.rule == rule


def test_names_are_unique_and_every_rule_says_what_it_means_and_what_to_do() -> None:
    names = [rule.name for rule in RULES]

    assert len(set(names)) == len(names)
    assert all(type(rule).__doc__ for rule in RULES)
    assert all(rule.remedies or type(rule).advise is not RULES[0].__class__.advise for rule in RULES)


def test_the_advice_fits_the_operation(tmp_path: Path) -> None:
    product = Fault(lambda m, x: torch.mm((m.weight * 300)[None], (m.weight * 300)[:, None]).sum(), dtype=torch.float16)
    quotient = Fault(lambda m, x: (m.weight / x).sum(), dtype=torch.float16)

    of_product, of_quotient = product.diagnose(tmp_path / "product"), quotient.diagnose(tmp_path / "quotient")
    of_sum = FAULTS["narrow_overflow"][0].diagnose(tmp_path / "sum")

    assert of_product is not None
    assert of_quotient is not None
    assert of_sum is not None
    assert "query" in of_product.remedies[0]
    assert not any("query" in remedy for remedy in of_sum.remedies)
    assert "float16" in of_quotient.remedies[0]  # where the 1e-8 of the others is 0


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("narrow_overflow", "Its largest magnitude would have been 81000; float16 ends at 65504."),
        ("division_by_zero", "1 of the denominators was 0."),
        ("log_domain", "The argument ranges from 0 to 3, 1 of it exactly 0."),
        ("lr_not_finite", "lr = nan."),
        ("optimizer_eps", "Adam has eps = 0."),
        ("update_overflow", "SGD with lr = 1e+38"),
        ("divergence", "It began at step 0: loss 4, gradient norm 4;"),
    ],
)
def test_the_cause_ends_in_the_numbers_of_the_case(name: str, fact: str, tmp_path: Path) -> None:
    fault, _ = FAULTS[name]
    if name == "narrow_overflow":
        fault = Fault(fault.loss, batch=(0.9, 0.5, 0.1, 0.2), dtype=torch.float16)

    diagnosis = fault.diagnose(tmp_path / "run")

    assert diagnosis is not None
    assert fact in diagnosis.cause


@pytest.mark.parametrize(
    ("entropy", "healthy"),
    [
        (lambda p: p * p.clamp_min(1e-12).log(), True),
        (lambda p: torch.special.xlogy(p, p), False),
        (lambda p: -torch.special.entr(p), False),
    ],
    ids=["clamped", "xlogy", "entr"],
)
def test_p_log_p_is_advised_in_the_form_whose_derivative_is_finite(
    entropy: Callable[[Tensor], Tensor], *, healthy: bool, tmp_path: Path
) -> None:
    diagnosis = Fault(lambda m, x: entropy(m.weight * x).sum()).diagnose(tmp_path / "run")

    assert (diagnosis is None) == healthy


@pytest.mark.parametrize(
    ("loss", "fact"),
    [
        (lambda m, x: torch.log1p(-m.weight).sum(), "ranges from -1 to -1, and log1p is -Inf at -1."),
        (lambda m, x: torch.xlogy(m.weight, x).sum(), "The argument ranges from 0 to 3, 1 of it exactly 0."),
    ],
    ids=["log1p", "xlogy"],
)
def test_a_logarithm_s_cause_speaks_of_what_it_is_taken_of(loss: Loss, fact: str, tmp_path: Path) -> None:
    diagnosis = Fault(loss).diagnose(tmp_path / "run")

    assert diagnosis is not None
    assert fact in diagnosis.cause
