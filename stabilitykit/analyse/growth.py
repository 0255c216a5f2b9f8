"""Which tensors grew, when it began, and how long until they overflow; all from a layer x step grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stabilitykit.analyse.grid import FINITE, Grid

if TYPE_CHECKING:
    from stabilitykit.analyse.columns import FloatArray

EARLY_SHARE = 0.1  # of a row's recorded columns: what "early" means
EARLY_AT_LEAST = 5
NOTABLE_DECADES = 1.0  # a tenfold change since the early median is worth a line
RECENT_SHARE = 0.25  # of a row's recorded columns: what "recent" means for the countdown
RECENT_AT_LEAST = 8
STEADY = 0.5  # share of the recent variance that a straight line must explain
LOG2_10 = math.log2(10)


@dataclass(frozen=True, kw_only=True)
class Growth:
    """A tensor whose largest magnitude left its early level.

    Attributes:
        row: of the grid.
        began: step at which growth began, see `change_point`.
        decades: powers of ten between the early median and the last recorded value.
        last: the last recorded max |value|.
    """

    row: int
    began: int
    decades: float
    last: float


@dataclass(frozen=True, kw_only=True)
class Countdown:
    """A tensor that overflows its dtype if it goes on as it did of late.

    Attributes:
        row: of the grid.
        headroom: bits to overflow when last recorded.
        bits_per_step: recent loss of headroom.
        steps: steps until nothing is left at that rate.
    """

    row: int
    headroom: float
    bits_per_step: float
    steps: float


def early_median(grid: Grid) -> FloatArray:
    """A row's usual size: the median of log10 max |value| over its first tenth of recorded columns, nan where none.

    Zeros and non-finite cells do not count. Subtract it from the grid and layers of any scale become comparable: 0 is
    as early on, +1 is ten times that.
    """
    medians = np.full(len(grid.log10), np.nan)
    for row, values in enumerate(grid.log10):
        usable = values[_usable(grid, row)]
        if usable.size:
            medians[row] = np.median(usable[: max(EARLY_AT_LEAST, round(EARLY_SHARE * usable.size))])
    return medians


def find_growth(grid: Grid) -> list[Growth]:
    """The rows that ended at least tenfold above their early median, largest change first."""
    medians = early_median(grid)
    found = []
    for row in range(len(grid.log10)):
        columns = np.flatnonzero(_usable(grid, row))
        if columns.size < 2 * EARLY_AT_LEAST:
            continue
        values = grid.log10[row, columns].astype(np.float64)
        decades = float(values[-1] - medians[row])
        if decades < NOTABLE_DECADES:
            continue
        turn = change_point(values)
        if turn < EARLY_AT_LEAST:  # grew from its initialisation, a bias from zero say
            continue
        began = grid.columns.start + grid.columns.width * int(columns[turn])
        found.append(Growth(row=row, began=began, decades=decades, last=10.0 ** float(values[-1])))
    return sorted(found, key=lambda growth: -growth.decades)


def change_point(values: npt.NDArray[np.float64]) -> int:
    """Where a flat line turns into a ramp: the break of the least-squares "hockey stick".

    For every candidate break k the series is fitted by a + b max(0, i - k), whose slope and level have a closed form;
    the k with the smallest squared error is returned. Apply it to logarithms: steady growth is a straight ramp there.
    """
    index = np.arange(values.size, dtype=np.float64)
    centred = values - values.mean()
    best, best_gain = 0, -1.0
    for candidate in range(values.size - 2):
        ramp = np.maximum(index - candidate, 0.0)
        ramp -= ramp.mean()
        gain = float(ramp @ centred) ** 2 / float(ramp @ ramp)  # variance explained; the largest has the least error
        if gain > best_gain:
            best, best_gain = candidate, gain
    return best


def find_countdowns(grid: Grid, last_headroom: FloatArray, horizon: float) -> list[Countdown]:
    """Tensors on a steady course to overflow within `horizon` steps, soonest first.

    The rate is a straight line through the last quarter of a row's recorded log2 max |value|, and counts as steady when
    it explains at least half of the variance there.
    """
    found = []
    for row in range(len(grid.log10)):
        columns = np.flatnonzero(_usable(grid, row))
        recent = columns[-max(RECENT_AT_LEAST, round(RECENT_SHARE * columns.size)) :]
        bits = float(last_headroom[row])
        if recent.size < RECENT_AT_LEAST or not math.isfinite(bits):
            continue
        steps = (recent * grid.columns.width).astype(np.float64)
        rate = steady_slope(steps, grid.log10[row, recent].astype(np.float64)) * LOG2_10
        if rate > 0 and bits / rate <= horizon:
            found.append(Countdown(row=row, headroom=bits, bits_per_step=rate, steps=bits / rate))
    return sorted(found, key=lambda countdown: countdown.steps)


def steady_slope(x: FloatArray, y: FloatArray) -> float:
    """Slope of the least-squares line, 0 where it explains less than half of the variance."""
    x, y = x - x.mean(), y - y.mean()
    spread, variance = float(x @ x), float(y @ y)
    if not spread or not variance:
        return 0.0
    slope = float(x @ y) / spread
    return slope if slope**2 * spread / variance >= STEADY else 0.0


def _usable(grid: Grid, row: int) -> npt.NDArray[np.bool_]:
    usable: npt.NDArray[np.bool_] = (grid.state[row] == FINITE) & np.isfinite(grid.log10[row])
    return usable
