import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stabilitykit.analyse.columns import Columns
from stabilitykit.analyse.grid import FINITE, NAN, Grid
from stabilitykit.analyse.growth import change_point, early_median, find_countdowns, find_growth, steady_slope


def grid_of(rows: np.ndarray, width: int = 1) -> Grid:
    columns = Columns(start=0, width=width, num=rows.shape[1])
    return Grid(columns=columns, log10=rows.astype(np.float32), state=np.full(rows.shape, FINITE, np.uint8))


def ramp(begin: int, length: int, slope: float) -> np.ndarray:
    return slope * np.maximum(0.0, np.arange(length) - begin)


def naive_change_point(values: np.ndarray) -> float:
    """Smallest squared error over all breaks, each fitted by numpy's own least squares."""
    errors = []
    for candidate in range(values.size - 2):
        design = np.stack([np.ones(values.size), ramp(candidate, values.size, 1.0)], axis=1)
        fitted = design @ np.linalg.lstsq(design, values, rcond=None)[0]
        errors.append(float(((values - fitted) ** 2).sum()))
    return errors[change_point(values)] - min(errors)


@given(begin=st.integers(5, 80), slope=st.floats(0.02, 1.0))
def test_the_change_point_of_a_ramp_is_where_it_begins(begin: int, slope: float) -> None:
    noise = np.random.default_rng(begin).normal(scale=0.001, size=100)

    assert change_point(ramp(begin, 100, slope) + noise) == pytest.approx(begin, abs=2)


@given(arrays(np.float64, st.integers(10, 30), elements=st.floats(-5, 5)))
def test_the_change_point_has_the_least_squared_error(values: np.ndarray) -> None:
    assert naive_change_point(values) == pytest.approx(0, abs=1e-6)


def test_growth_is_told_with_its_beginning_in_steps_and_its_size() -> None:
    rows = np.stack([np.zeros(100), ramp(60, 100, 0.1), ramp(80, 100, 0.2)])

    found = find_growth(grid_of(rows, width=7))

    assert [growth.row for growth in found] == [1, 2] or [growth.row for growth in found] == [2, 1]
    grown = {growth.row: growth for growth in found}
    assert grown[1].began == pytest.approx(420, abs=14)
    assert grown[1].decades == pytest.approx(3.9, abs=1e-5)
    assert grown[2].last == pytest.approx(10**3.8, rel=1e-4)


def test_values_that_are_not_finite_or_zero_do_not_count_as_early() -> None:
    grid = grid_of(np.full((1, 20), 2.0))
    grid.state[0, :5] = NAN
    grid.log10[0, 5:9] = -math.inf

    assert early_median(grid).tolist() == [2.0]


def test_a_row_of_nothing_has_no_early_median() -> None:
    assert np.isnan(early_median(grid_of(np.full((1, 9), np.nan)))).all()


def test_a_steady_climb_counts_down_to_its_overflow() -> None:
    rows = np.stack([ramp(0, 100, 0.01), np.zeros(100)])

    (countdown,) = find_countdowns(grid_of(rows, width=10), np.array([3.0, 3.0]), horizon=5_000)

    assert countdown.row == 0
    assert countdown.bits_per_step == pytest.approx(0.001 * math.log2(10), rel=1e-4)
    assert countdown.steps == pytest.approx(3.0 / (0.001 * math.log2(10)), rel=1e-4)


def test_noise_is_no_countdown() -> None:
    noise = np.random.default_rng(1).normal(size=(20, 200))

    assert find_countdowns(grid_of(noise), np.full(20, 1.0), horizon=1e9) == []


def test_a_slope_that_explains_little_is_none() -> None:
    x = np.arange(100.0)

    assert steady_slope(x, 2 * x) == pytest.approx(2)
    assert steady_slope(x, 0.001 * x + np.sin(x)) == 0.0
    assert steady_slope(np.zeros(3), np.ones(3)) == 0.0
