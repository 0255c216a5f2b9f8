"""Steps as columns of a figure: how wide one is, which steps have one each, which points of a series to keep."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_COLUMNS = 1_000
WINDOW = 200  # steps each side of a finding that are kept one by one
TAIL = 400  # last steps of the run that are kept one by one
MAX_WINDOWS = 6

DENSE_SHARE, DENSE_AT_LEAST = 0.9, 3  # of the steps up to the last known value: what makes a NaN among them news

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Equal bins of steps, `width` steps each, the first beginning at step `start`."""

    start: int
    width: int
    num: int

    @property
    def stop(self) -> int:
        """The step after the last one of the last column."""
        return self.start + self.width * self.num

    def of(self, steps: IntArray) -> IntArray:
        """The column of each step; outside 0 .. num - 1 for a step outside."""
        return (steps - self.start) // self.width


def overview_columns(last_step: int, max_columns: int = MAX_COLUMNS) -> Columns:
    """Columns over steps 0 .. last_step, one step wide where that fits in `max_columns`."""
    steps = max(last_step + 1, 1)
    width = -(-steps // max_columns)
    return Columns(start=0, width=width, num=-(-steps // width))


def detail_windows(last_step: int, findings: Iterable[int]) -> tuple[Columns, ...]:
    """Full-resolution columns: the last 400 steps and 200 steps each side of the first few findings, merged."""
    spans = [(max(last_step - TAIL + 1, 0), last_step + 1)] if last_step >= 0 else []
    around = sorted(set(findings))[: MAX_WINDOWS - 1]
    spans += [(max(step - WINDOW, 0), min(step + WINDOW, last_step) + 1) for step in around]
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(Columns(start=start, width=1, num=stop - start) for start, stop in merged)


def thin(values: FloatArray, columns: IntArray) -> IntArray:
    """Positions of the points that draw the same line: the smallest and largest finite value of each column.

    Every kept point is a real one, at its true step. `columns` is the column of each point, ascending.
    """
    finite = np.flatnonzero(np.isfinite(values))
    if not finite.size:
        return finite
    order = finite[np.lexsort((values[finite], columns[finite]))]
    edge = np.flatnonzero(np.diff(columns[order])) + 1
    lowest = order[np.concatenate(([0], edge))]
    highest = order[np.concatenate((edge - 1, [order.size - 1]))]
    return np.unique(np.concatenate((lowest, highest)))


def is_dense(values: FloatArray) -> bool:
    """Whether a series was measured at nearly every step, so that a NaN in it is a value and not a gap."""
    finite = np.flatnonzero(np.isfinite(values))
    return finite.size >= DENSE_AT_LEAST and finite.size >= DENSE_SHARE * (finite[-1] + 1 - finite[0])


def went_nan(values: FloatArray) -> BoolArray:
    """Where a series that was measured at nearly every step became NaN; nowhere in one measured now and then."""
    if not is_dense(values):
        return np.zeros(values.shape, bool)
    gone: BoolArray = np.isnan(values) & (np.arange(values.size) > np.argmax(np.isfinite(values)))
    return gone
