"""Layer x step grids of max |value|: rows of the tensors table, streamed once, at most 1,000 columns a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stabilitykit.analyse.columns import Columns, FloatArray, IntArray

Float32Array = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
Values = npt.NDArray[np.generic]
MISSING, FINITE, INF, NAN = range(4)  # what a cell holds; the worst of its column wins, in this order
LEAD = 100  # the longest cadence there is: a window shows what was recorded up to so many steps before it
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One role's tensors (rows) over columns of steps.

    Attributes:
        columns: which steps each column covers.
        log10: log10 of the largest |finite value| in the cell, -inf where all are zero, nan where none is.
        state: MISSING, FINITE, INF or NAN.
    """

    columns: Columns
    log10: Float32Array
    state: ByteArray


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """What is known of each tensor of a role beside its grid; arrays have an entry a row."""

    ids: tuple[int, ...]
    first_nonfinite: tuple[int | None, ...]
    last_headroom: FloatArray  # bits to overflow when last recorded
    lowest_headroom: FloatArray
    lowest_step: IntArray


@dataclass(frozen=True, kw_only=True)
class RoleGrids:
    """Everything that was recorded in one role: the overview, the full-resolution windows, facts a row."""

    role: str
    facts: TensorFacts
    overview: Grid
    windows: tuple[Grid, ...]


@dataclass
class _Row:
    """Running facts of one tensor in one role."""

    order: float = np.inf
    first_nonfinite: int = _NEVER
    last_step: int = -1
    last_headroom: float = np.nan
    lowest_headroom: float = np.inf
    lowest_step: int = -1


@dataclass
class _Cells:
    """A grid while it is being filled: rows are added as tensors are met."""

    columns: Columns
    lead: int = 0  # columns in front that are filled, held into the first shown one, and not shown
    log10: Float32Array = field(init=False)
    state: ByteArray = field(init=False)

    def __post_init__(self) -> None:
        shown = self.columns
        start = shown.start - self.lead * shown.width
        self.columns = Columns(start=start, width=shown.width, num=shown.num + self.lead)
        self.log10 = np.full((0, self.columns.num), np.nan, np.float32)
        self.state = np.zeros((0, self.columns.num), np.uint8)

    def add(self, rows: IntArray, steps: IntArray, log10: Float32Array, state: ByteArray) -> None:
        column = self.columns.of(steps)
        inside = (column >= 0) & (column < self.columns.num)
        if not inside.any():
            return
        self._grow(int(rows.max()) + 1)
        where = rows[inside] * self.columns.num + column[inside]  # flat: ufunc.at is ten times faster on one index
        np.fmax.at(self.log10.reshape(-1), where, log10[inside])
        np.maximum.at(self.state.reshape(-1), where, state[inside])

    def _grow(self, num: int) -> None:
        more = num - len(self.state)
        if more > 0:  # doubled, so that filling stays linear
            more = max(more, len(self.state))
            self.log10 = np.concatenate((self.log10, np.full((more, self.columns.num), np.nan, np.float32)))
            self.state = np.concatenate((self.state, np.zeros((more, self.columns.num), np.uint8)))

    def take(self, rows: IntArray, recorded: IntArray, reach: IntArray) -> Grid:
        """The finished grid: `rows` in display order, each recording held until the next one is due."""
        self._grow(int(rows.max()) + 1 if rows.size else 0)
        source = _held_column(self.columns, recorded, reach)[self.lead :]
        log10 = np.where(source >= 0, self.log10[rows][:, source], np.float32(np.nan))
        state = np.where(source >= 0, self.state[rows][:, source], np.uint8(MISSING))
        shown = Columns(
            start=self.columns.start + self.lead * self.columns.width, width=self.columns.width, num=source.size
        )
        return Grid(columns=shown, log10=log10, state=state)


class GridBuilder:
    """Collects batches of the tensors table into grids, a role at a time; memory is bounded by the grids' size."""

    def __init__(self, overview: Columns, windows: Sequence[Columns]) -> None:
        self._layouts = ((overview, 0), *((window, LEAD) for window in windows))
        self._cells: dict[int, list[_Cells]] = {}
        self._rows: dict[int, dict[int, _Row]] = {}
        self._recorded: dict[int, list[IntArray]] = {}

    def add(self, batch: Mapping[str, Values]) -> None:
        """Add rows; `batch` holds step, order, tensor, role, nan, posinf, neginf, min, max, headroom, unsupported."""
        measured = batch["unsupported"] == 0
        columns = {name: values[measured] for name, values in batch.items()}
        for role in np.unique(columns["role"]).tolist():
            chosen = columns["role"] == role
            self._add_role(int(role), {name: values[chosen] for name, values in columns.items()})

    def grids(self, roles: Sequence[str]) -> tuple[RoleGrids, ...]:
        """The finished grids in the order of `roles`, which names the role ids; roles without rows are left out."""
        return tuple(self._role_grids(role, roles[role]) for role in sorted(self._cells) if role < len(roles))

    def _add_role(self, role: int, batch: Mapping[str, Values]) -> None:
        known = self._rows.setdefault(role, {})
        ids, local = np.unique(batch["tensor"], return_inverse=True)
        for tensor in ids.tolist():
            known.setdefault(tensor, _Row())
        number = {tensor: index for index, tensor in enumerate(known)}
        rows = np.array([number[tensor] for tensor in ids.tolist()], np.int64)[local]
        steps = batch["step"].astype(np.int64)
        log10, state = cell_values(batch)
        for cells in self._cells.setdefault(role, [_Cells(*layout) for layout in self._layouts]):
            cells.add(rows, steps, log10, state)
        self._recorded.setdefault(role, []).append(np.unique(steps))
        _update_facts([known[tensor] for tensor in ids.tolist()], local, steps, state, batch)

    def _role_grids(self, role: int, name: str) -> RoleGrids:
        known = self._rows[role]
        items = list(known.items())
        display = np.array(sorted(range(len(items)), key=lambda row: (items[row][1].order, items[row][0])), np.int64)
        recorded = np.unique(np.concatenate(self._recorded[role]))
        reach = recorded + recording_interval(recorded)
        overview, *windows = (cells.take(display, recorded, reach) for cells in self._cells[role])
        ordered = [items[row] for row in display.tolist()]
        return RoleGrids(role=name, facts=_facts(ordered), overview=overview, windows=tuple(windows))


def cell_values(batch: Mapping[str, Values]) -> tuple[Float32Array, ByteArray]:
    """Each row's log10 max |value| and its state."""
    low, high = batch["min"].astype(np.float64), batch["max"].astype(np.float64)
    absmax = np.fmax(np.abs(low), np.abs(high))
    with np.errstate(divide="ignore"):
        log10 = np.log10(absmax).astype(np.float32)
    infinite = (batch["posinf"].astype(np.int64) + batch["neginf"].astype(np.int64)) > 0
    state = np.where(np.isnan(log10), MISSING, FINITE).astype(np.uint8)  # an empty tensor has no values: not recorded
    state[infinite] = INF
    state[batch["nan"].astype(np.int64) > 0] = NAN
    return log10, state


def recording_interval(recorded: IntArray) -> IntArray:
    """Steps each recording stands for: up to the next one within a cadence, else as many as the one before."""
    if recorded.size < 2:
        return np.ones_like(recorded)
    gaps = np.diff(recorded)
    before, after = np.concatenate((gaps[:1], gaps)), np.append(gaps, np.median(gaps).astype(np.int64))
    return np.where(after <= LEAD, after, np.minimum(before, LEAD))


def _held_column(columns: Columns, recorded: IntArray, reach: IntArray) -> IntArray:
    """For each column, the column whose recording holds there: itself, an earlier one, or -1 for none."""
    first = columns.start + columns.width * np.arange(columns.num, dtype=np.int64)
    latest = np.searchsorted(recorded, first + columns.width - 1, side="right") - 1
    held = (latest >= 0) & (reach[np.maximum(latest, 0)] > first)
    return np.where(held, np.maximum(columns.of(recorded[np.maximum(latest, 0)]), -1), -1)


def _update_facts(
    rows: Sequence[_Row],
    local: IntArray,
    steps: IntArray,
    state: ByteArray,
    batch: Mapping[str, Values],
) -> None:
    headroom = batch["headroom"].astype(np.float64)
    sorter = np.argsort(local, kind="stable")
    bounds = np.searchsorted(local[sorter], np.arange(len(rows) + 1))
    for index, row in enumerate(rows):
        mine = sorter[bounds[index] : bounds[index + 1]]
        row.order = min(row.order, float(batch["order"][mine].astype(np.float64).min()))
        bad = steps[mine][state[mine] >= INF]
        row.first_nonfinite = min(row.first_nonfinite, int(bad.min())) if bad.size else row.first_nonfinite
        bits = mine[~np.isnan(headroom[mine])]
        if not bits.size:
            continue
        newest = bits[np.lexsort((-headroom[bits], steps[bits]))[-1]]
        if steps[newest] >= row.last_step:
            row.last_step, row.last_headroom = int(steps[newest]), float(headroom[newest])
        lowest = bits[np.argmin(headroom[bits])]
        if headroom[lowest] < row.lowest_headroom:
            row.lowest_headroom, row.lowest_step = float(headroom[lowest]), int(steps[lowest])


def _facts(rows: Sequence[tuple[int, _Row]]) -> TensorFacts:
    return TensorFacts(
        ids=tuple(tensor for tensor, _ in rows),
        first_nonfinite=tuple(None if row.first_nonfinite == _NEVER else row.first_nonfinite for _, row in rows),
        last_headroom=np.array([row.last_headroom for _, row in rows]),
        lowest_headroom=np.array([row.lowest_headroom for _, row in rows]),
        lowest_step=np.array([row.lowest_step for _, row in rows], np.int64),
    )
