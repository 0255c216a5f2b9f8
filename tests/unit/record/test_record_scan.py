import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stabilitykit.record.scan import storage_order

TENSORS = st.integers(-3, 5) | st.integers(0, 2**31 - 1)


@given(
    rows=st.lists(st.tuples(TENSORS, st.integers(0, 255), st.integers(-(2**40), 2**40)), max_size=40),
    in_order=st.booleans(),
)
def test_storage_order_is_that_of_a_stable_sort_by_all_keys(rows: list[tuple[int, int, int]], in_order: bool) -> None:
    rows = sorted(rows, key=lambda row: row[2]) if in_order else rows
    table = np.array(rows, dtype=[("tensor", "<i4"), ("role", "u1"), ("step", "<i8")])

    order = storage_order([table["tensor"], table["role"], table["step"]])

    assert order.tolist() == sorted(range(len(rows)), key=lambda row: rows[row])


def test_rows_that_have_only_a_step_keep_their_order_within_it() -> None:
    assert storage_order([np.array([3, 1, 3, 1])]).tolist() == [1, 3, 0, 2]
    assert storage_order([np.array([1, 1, 2])]).tolist() == [0, 1, 2]
