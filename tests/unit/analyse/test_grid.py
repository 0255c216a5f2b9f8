import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitykit.analyse.columns import Columns
from stabilitykit.analyse.grid import FINITE, INF, MISSING, NAN, GridBuilder, RoleGrids, recording_interval
from stabilitykit.schema import ROLES

COLUMNS = ("step", "order", "tensor", "role", "nan", "posinf", "neginf", "min", "max", "headroom", "unsupported")
ROW = st.tuples(
    st.integers(0, 29),  # step
    st.integers(0, 3),  # tensor
    st.sampled_from([(0, 0), (0, 0), (0, 0), (1, 0), (0, 1), (1, 1)]),  # nan, inf
    st.floats(-1e3, 1e3),
)


def batch(rows: list[tuple[int, int, tuple[int, int], float]]) -> dict[str, np.ndarray]:
    table = {
        "step": [step for step, *_ in rows],
        "tensor": [tensor for _, tensor, *_ in rows],
        "order": [tensor for _, tensor, *_ in rows],
        "nan": [bad[0] for *_, bad, _ in rows],
        "posinf": [bad[1] for *_, bad, _ in rows],
        "min": [min(value, 0.0) for *_, value in rows],
        "max": [max(value, 0.0) for *_, value in rows],
        "headroom": [10.0 - value / 1000 for *_, value in rows],
    }
    zeros = [0] * len(rows)
    return {name: np.array(table.get(name, zeros)) for name in COLUMNS}


def build(rows: list[tuple[int, int, tuple[int, int], float]], columns: Columns, *windows: Columns) -> RoleGrids:
    builder = GridBuilder(columns, windows)
    for half in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        if half:
            builder.add(batch(half))
    (grids,) = builder.grids(ROLES)
    return grids


@given(st.lists(ROW, min_size=1, max_size=60), st.integers(1, 7))
def test_a_cell_is_the_worst_of_its_steps(rows: list[tuple[int, int, tuple[int, int], float]], width: int) -> None:
    columns = Columns(start=0, width=width, num=-(-30 // width))

    grids = build(rows, columns)

    for place, tensor in enumerate(grids.facts.ids):
        for column in range(columns.num):
            mine = [row for row in rows if row[1] == tensor and row[0] // width == column]
            if not mine:
                continue
            state = NAN if any(row[2][0] for row in mine) else INF if any(row[2][1] for row in mine) else FINITE
            assert grids.overview.state[place, column] == state
            largest = max(abs(row[3]) for row in mine)
            expected = math.log10(largest) if largest else -math.inf
            assert grids.overview.log10[place, column] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        bad = [row[0] for row in rows if row[1] == tensor and any(row[2])]
        assert grids.facts.first_nonfinite[place] == min(bad, default=None)


def test_between_recordings_the_last_one_is_held_and_no_longer() -> None:
    rows = [(step, 0, (0, 0), 10.0) for step in (0, 5, 10)] + [(0, 1, (0, 0), 1.0), (10, 1, (0, 0), 1.0)]

    state = build(rows, Columns(start=0, width=1, num=30)).overview.state

    assert (state[0, :15] == FINITE).all()
    assert (state[0, 15:] == MISSING).all()
    assert (state[1, :5] == FINITE).all()
    assert (state[1, 5:10] == MISSING).all()  # the recording of step 5 has it not


def test_a_nan_is_not_painted_before_its_step() -> None:
    rows = [(0, 0, (0, 0), 1.0), (10, 0, (0, 0), 1.0), (17, 0, (1, 0), 1.0)]

    state = build(rows, Columns(start=0, width=1, num=20)).overview.state[0]

    assert (state[:17] == FINITE).all()
    assert state[17] == NAN


def test_a_window_shows_what_was_recorded_shortly_before_it() -> None:
    rows = [(step, 0, (0, 0), float(step + 1)) for step in (0, 20, 40)]

    (window,) = build(rows, Columns(start=0, width=60, num=1), Columns(start=35, width=1, num=10)).windows

    assert window.columns == Columns(start=35, width=1, num=10)
    assert (10 ** window.log10[0]).tolist() == pytest.approx([21.0] * 5 + [41.0] * 5)


def test_rows_come_in_execution_order_and_unsupported_tensors_are_missing() -> None:
    late_first = batch([(0, 7, (0, 0), 1.0), (0, 3, (0, 0), 1.0)])
    late_first["order"] = np.array([2, 1])
    unsupported = batch([(0, 9, (0, 0), 1.0)]) | {"unsupported": np.array([1])}
    builder = GridBuilder(Columns(start=0, width=1, num=1), ())

    builder.add(late_first)
    builder.add(unsupported)

    (grids,) = builder.grids(ROLES)
    assert grids.facts.ids == (3, 7)


def test_headroom_is_told_when_lowest_and_when_last() -> None:
    rows = [(0, 0, (0, 0), 0.0), (1, 0, (0, 0), 900.0), (2, 0, (0, 0), 100.0)]

    facts = build(rows, Columns(start=0, width=1, num=3)).facts

    assert facts.lowest_headroom[0] == pytest.approx(9.1)
    assert facts.lowest_step[0] == 1
    assert facts.last_headroom[0] == pytest.approx(9.9)


def test_a_long_gap_is_not_filled_and_a_changing_cadence_is() -> None:
    assert recording_interval(np.array([0, 1, 2, 7, 12, 5_000, 5_005])).tolist() == [1, 1, 5, 5, 5, 5, 5]
    assert recording_interval(np.array([3])).tolist() == [1]
