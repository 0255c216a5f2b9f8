"""A run's tensors table streamed into layer x step maps, one a role, with names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stabilitykit.analyse.grid import Grid, GridBuilder, RoleGrids, TensorFacts
from stabilitykit.analyse.growth import Countdown, Growth, early_median, find_countdowns, find_growth
from stabilitykit.schema import ROLES

if TYPE_CHECKING:
    from stabilitykit.analyse.columns import Columns, FloatArray, IntArray
    from stabilitykit.read import Run

WHOLE_MODEL = "(model)"  # the root module's qualified name is ""
Values = npt.NDArray[np.generic]
_COUNTS = ("nan", "posinf", "neginf", "unsupported")
COLUMNS = ("rank", "attempt", "step", "order", "tensor", "role", "min", "max", "headroom", *_COUNTS)


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """One role of the run: its tensors in execution order, their grids, and what stands out.

    Attributes:
        role: output, gradient, parameter, ...
        names: a tensor a row.
        early: a row's usual log10 max |value|, see `early_median`.
        growth: rows that ended at least tenfold above that, largest change first.
        countdowns: rows on a steady course to overflow, soonest first.
    """

    role: str
    names: tuple[str, ...]
    facts: TensorFacts
    overview: Grid
    windows: tuple[Grid, ...]
    early: FloatArray
    growth: tuple[Growth, ...]
    countdowns: tuple[Countdown, ...]

    @property
    def nonfinite(self) -> tuple[tuple[int, str], ...]:
        """First non-finite step and name of every tensor that had one, earliest first, then in execution order."""
        firsts = zip(self.facts.first_nonfinite, self.names, strict=True)
        return tuple(sorted(((step, name) for step, name in firsts if step is not None), key=lambda first: first[0]))


def layer_maps(
    batches: Iterator[Mapping[str, Values]],
    names: Mapping[int, str],
    overview: Columns,
    windows: Sequence[Columns],
) -> tuple[LayerMap, ...]:
    """Maps of every role that `batches` hold; countdowns look ahead as far as the run has come."""
    builder = GridBuilder(overview, windows)
    for batch in batches:
        builder.add(batch)
    return tuple(_layer_map(grids, names, overview.stop) for grids in builder.grids(ROLES))


def tensor_batches(run: Run, rank: int, steps: IntArray, attempts: IntArray) -> Iterator[dict[str, Values]]:
    """One rank's tensors table in batches, rows of superseded attempts left out.

    Args:
        run: the run to read.
        rank: whose rows.
        steps: steps of the latest attempts, ascending.
        attempts: the attempt that holds for each of them.
    """
    resumed = bool(attempts.size) and bool((attempts != attempts[0]).any())
    for batch in _stored_batches(run):
        holds = batch["rank"] == rank
        if resumed:
            position = np.minimum(np.searchsorted(steps, batch["step"]), steps.size - 1)
            holds &= (steps[position] != batch["step"]) | (attempts[position] == batch["attempt"])
        if holds.any():
            yield batch if holds.all() else {name: values[holds] for name, values in batch.items()}


def _stored_batches(run: Run) -> Iterator[dict[str, Values]]:
    """Batches as stored; where a part is damaged, again from what could be saved: adding a row twice is harmless."""
    dataset = run.table("tensors")
    try:
        for batch in dataset.to_batches(columns=list(COLUMNS), batch_size=1 << 17):
            yield {name: batch.column(name).to_numpy(zero_copy_only=False) for name in COLUMNS}
    except (OSError, pa.ArrowInvalid):
        frame = run.tensors()
        frame = frame.assign(role=lambda rows: rows["role"].map(list(ROLES).index))
        yield {name: frame[name].to_numpy() for name in COLUMNS}


def _layer_map(grids: RoleGrids, names: Mapping[int, str], horizon: float) -> LayerMap:
    return LayerMap(
        role=grids.role,
        names=tuple(names.get(tensor, f"tensor {tensor}") or WHOLE_MODEL for tensor in grids.facts.ids),
        facts=grids.facts,
        overview=grids.overview,
        windows=grids.windows,
        early=early_median(grids.overview),
        growth=tuple(find_growth(grids.overview)),
        countdowns=tuple(find_countdowns(grids.overview, grids.facts.last_headroom, horizon)),
    )
