import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitykit.errors import UsageError
from stabilitykit.guards import GradientClip, Guards, MixedPrecision, StepValidation


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, precision: MixedPrecision, factor: float = 1.0) -> None:
    optimizer.zero_grad()
    with precision.autocast():
        loss = factor * model(torch.ones(3, 4)).square().mean()
    precision.backward(loss)
    precision.unscale(optimizer)
    precision.step(optimizer)


def test_float32_is_bit_identical_to_a_loop_without_the_guard() -> None:
    model, optimizer = make()
    start = model.weight.detach().clone(), model.bias.detach().clone()
    step(model, optimizer, MixedPrecision("fp32", on_event=pytest.fail))

    bare = nn.Linear(4, 2)
    bare.load_state_dict({"weight": start[0], "bias": start[1]})
    bare_optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    bare(torch.ones(3, 4)).square().mean().backward()
    bare_optimizer.step()

    assert torch.equal(model.weight, bare.weight)
    assert torch.equal(model.bias, bare.bias)


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_half_precision_trains_with_float32_weights(half: str) -> None:
    model, optimizer = make()
    before = model.weight.detach().clone()

    step(model, optimizer, MixedPrecision(half))

    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)


def test_s24_gradients_that_float16_flushes_to_zero_reach_the_weights_through_the_scaler() -> None:
    model, optimizer = make()

    def gradient(precision: MixedPrecision) -> float:
        optimizer.zero_grad()
        with precision.autocast():
            outputs = model(torch.ones(3, 4))
        loss = (outputs.float() * 1e-9).sum()
        precision.backward(loss)
        precision.unscale(optimizer)
        precision.skip(optimizer)
        return float(model.weight.grad.abs().max())

    without_scaler = MixedPrecision("fp16")
    without_scaler.scaler = torch.amp.GradScaler("cpu", enabled=False)

    assert gradient(without_scaler) == 0
    assert gradient(MixedPrecision("fp16", init_scale=2.0**16)) == pytest.approx(3e-9, rel=0.1)


def test_s10_an_overflow_leaves_the_step_out_lowers_the_scale_and_says_so() -> None:
    events: list[dict[str, Any]] = []
    model, optimizer = make()
    before = model.weight.detach().clone()
    precision = MixedPrecision("fp16", init_scale=2.0**40, on_event=lambda kind, message, **data: events.append(data))

    step(model, optimizer, precision)

    assert torch.equal(model.weight, before)
    assert precision.scaler.get_scale() == 2.0**39
    assert events[0]["severity"] == "info"


def test_s10_a_step_that_another_guard_refused_still_reaches_the_scaler() -> None:
    model, optimizer = make()
    precision = MixedPrecision("fp16", init_scale=4.0)
    validation = StepValidation(model, optimizer, policy="record", stateful=(precision.scaler,))
    guards = Guards(precision=precision, validation=validation, clip=GradientClip(1.0))
    scales = []

    for factor in (math.nan, 1.0, math.nan):
        optimizer.zero_grad()
        with precision.autocast():
            loss = factor * model(torch.ones(3, 4)).square().mean()
        precision.backward(loss)
        guards.update(optimizer, loss)
        scales.append(precision.scaler.get_scale())

    assert scales == [2.0, 2.0, 1.0]
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_s10_the_scalers_own_overflows_are_no_unsound_steps_under_validation(policy: str) -> None:
    model, optimizer = make()
    precision = MixedPrecision("fp16", init_scale=2.0**40)
    guards = Guards(precision=precision, validation=StepValidation(model, optimizer, policy=policy))

    @guards.protect
    def step(inputs: Tensor) -> Tensor:
        optimizer.zero_grad()
        with precision.autocast():
            loss = model(inputs).square().mean()
        precision.backward(loss)
        guards.update(optimizer, loss)
        return loss.detach()

    losses = [step(torch.randn(3, 4)) for _ in range(30)]

    assert None not in losses
    assert precision.num_acted > 0
    assert precision.scaler.get_scale() < 2.0**40


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match="got 'half', expected fp32, bf16 or fp16"):
        MixedPrecision("half")
