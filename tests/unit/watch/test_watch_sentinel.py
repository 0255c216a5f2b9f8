"""The check of every step: what a gradient was before and after clipping, and what has gone bad."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stabilitykit.measure.norms import Norms
from stabilitykit.watch.reading import Reading


class Quadratic(nn.Module):
    """loss = factor * weight . inputs: the gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("floor", torch.full((2,), math.inf))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.weight * inputs).sum()


@pytest.fixture
def step(watched):
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = watched(model, optimizer)
    return model, optimizer, watch


def test_gradients_looked_at_before_an_update_are_looked_at_unseen_and_raise_nothing(
    watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stabilitykit.watch.writes.SMALL", 0)  # every model is a large one
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = watched(model, optimizer)
    before = model[0].weight.detach().clone()

    def broken(_: Norms) -> bool:
        raise ArithmeticError("no such norm")

    monkeypatch.setattr(Norms, "known_bad", broken)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()

    assert {str(error) for error in watch.errors} == {"no such norm"}
    watch.errors.clear()
    assert not torch.equal(before, model[0].weight)


def test_gradient_norms_before_and_after_clipping_are_told_apart(step) -> None:
    model, optimizer, watch = step

    model(torch.tensor([3.0, 4.0])).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    reading = watch.watch.read(None, {})
    assert reading.grad_norm == pytest.approx(5.0)
    assert reading.grad_norm_clipped == pytest.approx(1.0)
    roles = {row["role"]: row["l2"] for row in watch.rows()}
    assert roles["gradient"] == pytest.approx(5.0)
    assert roles["gradient_clipped"] == pytest.approx(1.0)


def test_without_clipping_both_norms_are_the_same_and_measured_once(step) -> None:
    model, optimizer, watch = step

    model(torch.tensor([3.0, 4.0])).backward()
    optimizer.step()

    reading = watch.watch.read(None, {})
    assert reading.grad_norm == reading.grad_norm_clipped == pytest.approx(5.0)
    assert watch.of("gradient_clipped") == []


def test_a_clip_that_makes_a_nan_is_told_from_a_backward_that_does(step) -> None:
    model, optimizer, watch = step

    model(torch.zeros(2)).backward()
    model.weight.grad.div_(model.weight.grad.norm())
    optimizer.step()

    reading = watch.watch.read(None, {})
    assert list(reading.bad_gradients) == []
    assert list(reading.bad_clipped) == ["weight"]
    assert reading.suspicious


def test_accumulated_gradients_are_measured_when_the_last_backward_ends(step) -> None:
    model, optimizer, watch = step

    model(torch.tensor([3.0, 0.0])).backward()
    model(torch.tensor([0.0, 4.0])).backward()
    optimizer.step()

    reading = watch.watch.read(None, {})
    assert (reading.num_backwards, reading.grad_norm) == (2, pytest.approx(5.0))
    assert [row["micro"] for row in watch.rows() if row["role"] == "gradient"] == [0, 1]


def test_bad_gradients_that_no_optimizer_used_are_no_suspicion(step) -> None:
    model, _, watch = step

    model(torch.tensor([math.inf, 0.0])).backward()

    reading = watch.watch.read(None, {})
    assert list(reading.bad_gradients) == ["weight"]
    assert reading.unused_gradients
    assert not reading.suspicious


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_or_term_is_named(step, bad: float) -> None:
    _, _, watch = step

    returned = watch.watch.read({"total": torch.tensor(bad), "accuracy": torch.tensor(1.0)}, {"kl": torch.tensor(0.5)})
    term = watch.watch.read(torch.tensor(1.0), {"kl": bad})

    assert list(returned.bad_losses) == ["loss['total']"]
    assert list(term.bad_losses) == ["kl"]
    assert returned.suspicious
    assert term.suspicious


def test_parameters_that_the_update_spoilt_are_named(step) -> None:
    model, optimizer, watch = step
    optimizer.param_groups[0]["lr"] = math.nan

    model(torch.ones(2)).backward()
    optimizer.step()

    reading = watch.watch.read(None, {})
    assert list(reading.bad_parameters) == ["weight"]
    assert list(reading.bad_gradients) == []


def test_a_module_buffer_is_bad_when_it_turns_bad_and_only_then(step) -> None:
    model, _, watch = step
    first = watch.watch.read(None, {})
    model.average.fill_(math.nan)
    second = watch.watch.read(None, {})

    assert list(first.bad_buffers) == []  # `floor` was infinite from the start: it is meant to be
    assert list(second.bad_buffers) == ["average"]


def test_a_module_buffer_assigned_anew_is_watched_as_well(step) -> None:
    model, _, watch = step

    model.average = torch.tensor([math.nan, 0.0])

    assert list(watch.watch.read(None, {}).bad_buffers) == ["average"]


def test_a_buffer_that_was_infinite_from_the_start_may_be_reset_to_inf_but_not_become_nan(step) -> None:
    model, _, watch = step
    model.floor.fill_(1.0)
    watch.watch.read(None, {})

    model.floor.fill_(math.inf)
    reset = watch.watch.read(None, {})
    model.floor.fill_(1.0)
    watch.watch.read(None, {})
    model.floor.fill_(math.nan)
    spoilt = watch.watch.read(None, {})

    assert list(reset.bad_buffers) == []
    assert list(spoilt.bad_buffers) == ["floor"]


def test_parameters_that_are_bad_when_the_watch_begins_are_known(watched) -> None:
    model = Quadratic()
    with torch.no_grad():
        model.weight[0] = math.nan

    assert list(watched(model).watch.bad_before) == ["weight"]


def test_a_frozen_parameter_and_one_without_gradient_do_no_harm(watched) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = watched(model, optimizer)

    model[1](model[0](torch.ones(1, 2))).sum().backward()
    optimizer.step()

    assert not watch.watch.read(None, {}).suspicious
    assert set(watch.of("gradient")) == {"1.weight", "1.bias"}


def test_a_shared_weight_is_measured_once(watched) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    watch = watched(model)

    model(torch.ones(1, 2)).sum().backward()

    assert watch.of("gradient") == ["0.weight"]


def test_update_parameter_state_and_buffers_are_rows_of_the_steps_end(watched) -> None:
    model = Quadratic()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    watch = watched(model, optimizer, optimizer_state=True)

    model(torch.tensor([3.0, 4.0])).backward()
    optimizer.step()
    norm = watch.watch.update_norm(0)

    rows = {(row["role"], row["name"]): row for row in watch.rows()}
    assert norm == pytest.approx(0.5 * math.sqrt(2), rel=1e-4)
    assert rows["update", "weight"]["mean"] == pytest.approx(-0.5, rel=1e-4)
    assert rows["parameter", "weight"]["mean"] == pytest.approx(0.5, rel=1e-4)
    assert rows["optimizer_state", "weight.exp_avg"]["max"] == pytest.approx(0.4, rel=1e-4)
    assert rows["module_buffer", "floor"]["posinf"] == 2


def test_two_readings_agree_when_every_number_does_and_nan_equals_nan() -> None:
    one = Reading(losses={"loss": math.nan}, gradient_norms=(1.0, 2.0), parameter_norm=3.0)
    same = Reading(losses={"loss": math.nan}, gradient_norms=(1.0, 2.0), parameter_norm=3.0)

    assert one.same_step(same)
    assert not one.same_step(Reading(losses={"loss": math.nan}, gradient_norms=(1.0, 2.5), parameter_norm=3.0))
    assert not one.same_step(Reading(losses={"loss": math.nan}, gradient_norms=(1.0,), parameter_norm=3.0))
    assert not one.same_step(Reading(losses={"loss": 0.0}, gradient_norms=(1.0, 2.0), parameter_norm=3.0))
