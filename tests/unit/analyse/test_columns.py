from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stabilitykit.analyse.columns import detail_windows, overview_columns, thin, went_nan

STEPS = st.integers(-1, 10**9)
VALUES = st.floats(-1e3, 1e3) | st.just(float("nan")) | st.just(float("inf"))


@given(last=STEPS)
def test_an_overview_covers_every_step_in_at_most_a_thousand_columns(last: int) -> None:
    columns = overview_columns(last)

    assert columns.num <= 1000
    assert columns.start == 0
    assert columns.stop > last
    assert columns.stop - columns.width <= max(last, 0)


def test_a_short_run_has_a_column_a_step() -> None:
    assert (overview_columns(999).width, overview_columns(1000).width) == (1, 2)


@given(last=st.integers(-1, 10**6), findings=st.lists(st.integers(0, 10**6), max_size=30))
def test_windows_are_full_resolution_apart_and_inside_the_run(last: int, findings: list[int]) -> None:
    windows = detail_windows(last, findings)

    assert all(window.width == 1 and window.num > 0 for window in windows)
    assert all(window.start >= 0 and window.stop <= last + 1 for window in windows)
    assert all(before.stop < after.start for before, after in pairwise(windows))
    assert sum(window.num for window in windows) <= 400 + 5 * 401


def test_windows_hold_the_last_400_steps_and_200_around_each_finding() -> None:
    windows = detail_windows(99_999, [5_000])

    assert [(window.start, window.stop) for window in windows] == [(4_800, 5_201), (99_600, 100_000)]


@given(arrays(np.float64, st.integers(0, 60), elements=VALUES), st.integers(1, 9))
def test_thinning_keeps_the_extremes_of_every_column(values: np.ndarray, width: int) -> None:
    columns = np.arange(values.size) // width

    kept = thin(values, columns)

    assert sorted(set(kept.tolist())) == kept.tolist()
    assert np.isfinite(values[kept]).all()
    for column in np.unique(columns):
        inside = values[(columns == column) & np.isfinite(values)]
        shown = values[kept][columns[kept] == column]
        assert shown.size <= 2
        assert (not inside.size) or (shown.min() == inside.min() and shown.max() == inside.max())


def test_thinning_bounds_a_long_series() -> None:
    values = np.random.default_rng(0).normal(size=100_000)

    kept = thin(values, overview_columns(99_999).of(np.arange(100_000)))

    assert kept.size == pytest.approx(2_000, abs=2)


def test_a_nan_is_news_in_a_series_that_was_measured_at_every_step_alone() -> None:
    nan = float("nan")

    assert went_nan(np.array([nan, 1.0, 2.0, 3.0, nan, nan])).tolist() == [False, False, False, False, True, True]
    assert not went_nan(np.array([1.0, nan, nan, nan, nan] * 4)).any()
    assert not went_nan(np.full(5, nan)).any()
    assert not went_nan(np.array([])).any()
