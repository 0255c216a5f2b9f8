"""The tensors table at one row per 100 steps, a hundredth of the rows: `Run.rollup`, for maps of one's own.

Reports draw theirs from the tensors table, whose rows they read a batch at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stabilitykit.record.scan import LogRows

WINDOW_STEPS = 100
ROLLUP_ROW = np.dtype(
    [
        ("tensor", "<i4"),
        ("role", "u1"),
        ("num_rows", "<i8"),
        ("nan", "<i8"),  # sums over the rows
        ("posinf", "<i8"),
        ("neginf", "<i8"),
        ("min", "<f8"),  # over the finite values, nan where there are none
        ("max", "<f8"),
        ("headroom", "<f4"),  # the least
    ]
)


def roll_up(tensors: LogRows) -> LogRows:
    """One row per tensor, role, attempt and window of steps; its `step` is the first of the window.

    Args:
        tensors: rows in storage order. A window that two segments share gives a row in each: merge by min, max and sum.
    """
    window = tensors.step // WINDOW_STEPS * WINDOW_STEPS
    keys = (tensors.rows["tensor"], tensors.rows["role"], tensors.attempt, window)
    starts = _starts(keys)
    rows = np.empty(len(starts), ROLLUP_ROW)
    rows["tensor"], rows["role"] = tensors.rows["tensor"][starts], tensors.rows["role"][starts]
    rows["num_rows"] = np.diff(starts, append=len(window))
    for name in ("nan", "posinf", "neginf"):
        rows[name] = np.add.reduceat(tensors.rows[name], starts)
    for name, least in (("min", np.fmin), ("max", np.fmax), ("headroom", np.fmin)):  # fmin and fmax pass over NaN
        rows[name] = least.reduceat(tensors.rows[name], starts)
    return LogRows(tensors.attempt[starts], window[starts], rows)


def _starts(keys: tuple[NDArray[Any], ...]) -> NDArray[np.intp]:
    """Where a group of equal neighbours begins."""
    changes = np.zeros(len(keys[0]), dtype=bool)
    changes[:1] = True
    for key in keys:
        changes[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(changes)
