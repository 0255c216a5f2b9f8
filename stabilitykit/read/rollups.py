"""Rolled-up rows of a resumed run: a window that two attempts share counts each step once, for the attempt it is of."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stabilitykit.read.views import Spans
from stabilitykit.record.rollup import WINDOW_STEPS

MEASURED = ["rank", "attempt", "step", "tensor", "role", "nan", "posinf", "neginf", "min", "max", "headroom"]
_WINDOW = ["rank", "attempt", "step"]
_KEYS = ["step", "attempt", "tensor", "role", "rank"]
_HOW = dict.fromkeys(("num_rows", "nan", "posinf", "neginf"), "sum") | {"min": "min", "max": "max", "headroom": "min"}


def settled(rows: pd.DataFrame, spans: Spans) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows that hold as they are, and the windows (rank, attempt, step) of which a later attempt did a part again.

    Rows of windows that a later attempt did again as a whole are in neither.
    """
    redone, cut = np.zeros((2, len(rows)), dtype=bool)
    rank, attempt, step = (rows[name].to_numpy() for name in _WINDOW)
    end = step + WINDOW_STEPS - 1
    for (owner, later), (first, last) in spans.items():
        earlier = (rank == owner) & (attempt < later)
        redone |= earlier & (first <= step) & (end <= last)
        cut |= earlier & (first <= end) & (step <= last)
    return rows[~cut & ~redone], rows[cut & ~redone][_WINDOW].drop_duplicates()


def within(windows: pd.DataFrame) -> pc.Expression:
    """The tensor rows that lie in these windows, and maybe others' of the same steps."""
    steps = (windows["step"].to_numpy()[:, None] + np.arange(WINDOW_STEPS)).reshape(-1)
    return pc.field("step").isin(pa.array(np.unique(steps)))


def joined(rows: pd.DataFrame, measured: pd.DataFrame, windows: pd.DataFrame) -> pd.DataFrame:
    """`rows` and, as rows of one measurement each, what was measured in the windows."""
    single = measured.assign(step=measured["step"] // WINDOW_STEPS * WINDOW_STEPS, num_rows=1)
    return pd.concat([rows, single.merge(windows, on=_WINDOW)], ignore_index=True)


def merged(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a window, attempt, tensor and role: several segments may hold a share of it."""
    return rows.groupby(_KEYS, as_index=False).agg(_HOW)
