"""When a divergence began, and whether the step before threw the run off."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from stabilitykit.diagnose.rules.divergence import Overshoot, onset
from stabilitykit.schema import RunUpStep


def run_up(losses: list[float], parameter_norm: float = 1.0) -> SimpleNamespace:
    steps = [
        RunUpStep(step=i, loss=loss, grad_norm=1.0, parameter_norm=parameter_norm, absmax=1.0, absmax_tensor="")
        for i, loss in enumerate(losses)
    ]
    return SimpleNamespace(run_up=tuple(steps), operation=object(), kind="inf", op="pow")


def began(losses: list[float]) -> int | None:
    return onset(run_up(losses))


@pytest.mark.parametrize(
    ("losses", "start"),
    [
        ([0.3 * 1.5**i for i in range(20)], 0),
        ([1.0] * 10 + [1.0 * 2**i for i in range(1, 12)], 9),
        ([0.2, 0.01, 0.3, 0.1, 0.2, 0.1, 0.06, 45.0, 780.0, 2.6e5, 5.3e14], 6),  # not the smallest loss of all
        ([1.0, 2.0, 1.8, 4.0, 3.9, 9.0, 40.0, 38.0, 200.0], 0),  # noisy growth
        ([0.0, 1.0, 1e3, 1e6, 1e9], 0),
        ([1.0, 1e5, 1e10, math.inf], 0),
    ],
)
def test_it_is_where_the_last_rise_set_out(losses: list[float], start: int) -> None:
    assert began(losses) == start


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [1.0, 1e9],
        [1.0] * 20,
        [1e9, 1e6, 1e3, 1.0],
        [1.0, 50.0, 1.0, 50.0, 1.0, 50.0],
        [1e9, 1.0, 2.0, 4.0, 400.0],  # it has seen far worse
        [math.nan, 1.0, 1.0, 1.0],
    ],
)
def test_a_loss_that_did_not_grow_has_none(losses: list[float]) -> None:
    assert began(losses) is None


def test_a_loss_far_above_all_before_is_an_overshoot() -> None:
    assert Overshoot().applies(run_up([0.5, 0.4, 90.0]))


def test_a_loss_that_changes_its_sign_and_was_close_to_0_is_no_overshoot() -> None:
    assert not Overshoot().applies(run_up([0.5, -0.3, 1e-6, 0.4]))


def test_parameters_that_hold_an_inf_on_purpose_were_not_thrown() -> None:
    assert not Overshoot().applies(run_up([0.5, 0.4], parameter_norm=math.inf))
