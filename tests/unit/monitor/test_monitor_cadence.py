"""Recording keeps within its budget, and becomes dense by itself when a run leaves its own past."""

from __future__ import annotations

import math
import random

import pytest

from stabilitykit.monitor.cadence import PAUSE, WATCHED, Cadence


def run(cadence: Cadence, *, steps: int, recorded: float, plain: float = 1.0, sentinel: float = 0.0) -> list[int]:
    """The steps recorded, when a step takes `plain` seconds, `sentinel` of them ours, and `recorded` where recorded."""
    chosen = []
    for step in range(steps):
        recording = cadence.begin(step)
        chosen += [step] * recording
        cadence.spent = sentinel
        cadence.end((recorded if recording else plain) - sentinel, 1.0, 1.0)
    return chosen


def test_a_fixed_cadence_is_kept_whatever_it_costs() -> None:
    assert run(Cadence(5, 0.02), steps=16, recorded=10.0) == [0, 5, 10, 15]


@pytest.mark.parametrize(("recorded", "every"), [(1.01, 1), (1.03, 2), (1.19, 10), (1.9, 50), (50.0, 100)])
def test_the_densest_cadence_within_the_budget_is_found(recorded: float, every: int) -> None:
    cadence = Cadence(None, 0.02)

    run(cadence, steps=10, recorded=recorded)

    assert cadence.every == every


def test_what_the_sentinel_takes_is_not_left_for_recording() -> None:
    alone, beside = Cadence(None, 0.02), Cadence(None, 0.02)

    run(alone, steps=10, recorded=1.15)
    run(beside, steps=10, recorded=1.15, sentinel=0.01)

    assert alone.every == 10
    assert beside.every == 20


def test_a_sentinel_beyond_the_budget_leaves_half_of_it() -> None:
    cadence = Cadence(None, 0.02)

    run(cadence, steps=10, recorded=1.2, sentinel=0.1)

    assert cadence.every == 50


@pytest.mark.parametrize("series", ["loss", "gradient norm"])
def test_a_leap_of_loss_or_gradient_norm_makes_the_next_steps_dense(series: str) -> None:
    cadence = Cadence(None, 0.02)
    run(cadence, steps=60, recorded=50.0)

    loss, grad_norm = (30.0, 1.0) if series == "loss" else (1.0, 30.0)
    cadence.begin(60)
    cadence.end(1.0, loss, grad_norm)
    after = run(cadence, steps=2 * WATCHED, recorded=50.0)

    assert after == list(range(WATCHED))
    assert cadence.every == 100


def test_a_series_that_always_leaps_is_not_heeded_at_every_leap() -> None:
    cadence = Cadence(None, 0.02)
    run(cadence, steps=60, recorded=50.0)

    dense = 0
    for step in range(60, 60 + 3 * PAUSE):
        dense += cadence.begin(step)
        cadence.end(1.0, math.exp(step), 1.0)

    assert dense <= 3 * (WATCHED + 1) + 3


def test_noise_is_no_leap() -> None:
    cadence, noise = Cadence(None, 0.02), random.Random(0)
    run(cadence, steps=2, recorded=50.0)

    recorded = 0
    for step in range(101, 2000):
        recorded += cadence.begin(step)
        cadence.end(1.0, math.exp(noise.gauss(0.0, 0.5)), math.exp(noise.gauss(0.0, 0.5)))

    assert recorded == 19


def test_a_series_that_is_not_finite_or_zero_says_nothing() -> None:
    cadence = Cadence(None, 0.02)
    run(cadence, steps=60, recorded=50.0)

    for value in (math.nan, math.inf, 0.0, -1.0):
        cadence.begin(61)
        cadence.end(1.0, value, value)

    assert cadence.every == 100
