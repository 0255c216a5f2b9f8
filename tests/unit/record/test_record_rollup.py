import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitykit.record.rollup import WINDOW_STEPS, roll_up
from stabilitykit.record.scan import LogRows, SegmentLog
from stabilitykit.schema import TENSOR_ROW

VALUES = st.floats(allow_infinity=False) | st.just(math.nan)
MEASUREMENTS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 350), st.integers(0, 3), VALUES),
    min_size=1,
    max_size=30,
)


def table(measurements: list[tuple[int, int, int, int, float]]) -> LogRows:
    rows = np.zeros(len(measurements), TENSOR_ROW)
    for name, column in zip(("tensor", "role", "step", "nan", "max"), zip(*measurements, strict=True), strict=True):
        if name != "step":
            rows[name] = column
    rows["min"] = -rows["max"]
    steps = np.array([entry[2] for entry in measurements])
    log = SegmentLog(tables={"tensors": LogRows(np.zeros(len(rows), np.int32), steps, rows)})
    ordered = log.in_storage_order("tensors")
    assert ordered is not None
    return ordered


@given(measurements=MEASUREMENTS)
def test_a_window_holds_the_sums_and_extremes_of_its_rows(
    measurements: list[tuple[int, int, int, int, float]],
) -> None:
    _, steps, rows = roll_up(table(measurements))

    windows: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
    for tensor, role, step, nan, value in measurements:
        windows.setdefault((tensor, role, step // WINDOW_STEPS * WINDOW_STEPS), []).append((nan, value))
    keys = list(zip(rows["tensor"].tolist(), rows["role"].tolist(), steps.tolist(), strict=True))
    assert keys == sorted(windows)
    for key, row in zip(keys, rows, strict=True):
        finite = [value for _, value in windows[key] if not math.isnan(value)]
        assert row["num_rows"] == len(windows[key])
        assert row["nan"] == sum(nan for nan, _ in windows[key])
        assert row["max"] == pytest.approx(max(finite, default=math.nan), nan_ok=True)
        assert row["min"] == pytest.approx(-max(finite, default=math.nan), nan_ok=True)
