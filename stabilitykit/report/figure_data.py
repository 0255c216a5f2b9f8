"""The numbers behind the figures of the HTML report: quantised, thinned, compressed, of bounded size."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stabilitykit.analyse.findings import role_name
from stabilitykit.analyse.grid import INF, MISSING, NAN, Grid
from stabilitykit.analyse.wording import count, printable

if TYPE_CHECKING:
    from stabilitykit.analyse.columns import FloatArray, IntArray
    from stabilitykit.analyse.findings import Findings
    from stabilitykit.analyse.layer_map import LayerMap
    from stabilitykit.read import Run
    from stabilitykit.report.curve_data import Panel
    from stabilitykit.schema import Diagnosis, Origin

MAX_BYTES = 1_400_000  # of the packed numbers; the page around them is some 150 kB
MAX_ROWS = 400  # tensors of one role that are drawn
LEVELS = 64_000  # of log10 max |value| between a map's smallest and largest
ZERO, CODE_MISSING, CODE_INF, CODE_NAN = 65_532, 65_533, 65_534, 65_535
ROW_LIMITS = (MAX_ROWS, 200, 100, 50, 25, 10, 4)  # tried in turn until the packed numbers fit
LEADING_ROLE = {
    "forward": "output",
    "data": "input",
    "buffer": "input",
    "backward": "gradient",
    "clip": "gradient_clipped",
    "weights": "parameter",
    "optimizer": "parameter",
    "state": "module_buffer",
}


@dataclass
class Pack:
    """Arrays laid end to end; the page finds each by offset, length and type."""

    chunks: list[bytes] = field(default_factory=list)
    size: int = 0

    def add(self, values: npt.NDArray[np.generic]) -> dict[str, Any]:
        """Append an array and return its reference."""
        data = np.ascontiguousarray(values).tobytes()
        reference = {"at": self.size, "n": int(values.size), "type": values.dtype.str[1:]}
        padded = data + bytes(-len(data) % 8)  # typed arrays must begin at a multiple of their item size
        self.chunks.append(padded)
        self.size += len(padded)
        return reference

    def text(self) -> str:
        """Everything as base64 of a zlib stream."""
        return base64.b64encode(zlib.compress(b"".join(self.chunks), 6)).decode("ascii")


def page_data(run: Run, findings: Findings, drawn: Sequence[Panel], budget: int = MAX_BYTES) -> dict[str, Any]:
    """What the page's scripts draw from, its numbers packed into at most `budget` characters."""
    diagnosis = findings.diagnoses[0] if findings.diagnoses else None
    for limit in ROW_LIMITS:
        pack = Pack()
        curves = [_panel(panel, pack) for panel in drawn]
        maps = [_map(layer_map, diagnosis.origin if diagnosis else None, limit, pack) for layer_map in findings.maps]
        numbers = pack.text()
        if len(numbers) <= budget:
            break
    return {
        "last": run.last_step,
        "stopped": run.ending in {"killed", "raised"} and run.last_step >= 0,
        "after": "after the crash" if run.ending == "raised" else "after the kill",
        "fault": _fault(diagnosis),
        "tasks": [[span.task, span.first_step] for span in findings.tasks] if len(findings.tasks) > 1 else [],
        "role": leading_role(findings.maps, diagnosis),
        "maps": maps,
        "panels": curves,
        "numbers": numbers,
    }


def leading_role(maps: Sequence[LayerMap], diagnosis: Diagnosis | None) -> str:
    """The role that the page shows first: the one the fault's phase is about, outputs otherwise."""
    roles = [layer_map.role for layer_map in maps]
    wanted = LEADING_ROLE.get(diagnosis.origin.phase, "output") if diagnosis else "output"
    return next((role for role in (wanted, "output", "gradient", "parameter", *roles) if role in roles), "")


def origin_row(layer_map: LayerMap, origin: Origin) -> int | None:
    """The row the origin is about: its tensor, its module, a part of its module, or the first that went bad."""
    for wanted in filter(None, (origin.tensor, origin.module)):
        if wanted in layer_map.names:
            return layer_map.names.index(wanted)
    inside = [row for row, name in enumerate(layer_map.names) if origin.module and name.startswith(f"{origin.module}.")]
    firsts = layer_map.facts.first_nonfinite
    bad = [row for row in (inside or range(len(firsts))) if firsts[row] == origin.step]
    return bad[0] if bad else inside[0] if inside else None


def chosen_rows(layer_map: LayerMap, keep: int | None, limit: int) -> IntArray:
    """Rows to draw when there are too many: the origin, those that went bad or grew, then an even sample; in order."""
    num = len(layer_map.names)
    if num <= limit:
        return np.arange(num, dtype=np.int64)
    firsts = layer_map.facts.first_nonfinite
    ranked = [] if keep is None else [keep]
    ranked += sorted((row for row in range(num) if firsts[row] is not None), key=lambda row: (firsts[row] or 0, row))
    notable = dict.fromkeys([*ranked[: limit // 2], *(growth.row for growth in layer_map.growth[: limit // 4])])
    others = np.setdiff1d(np.arange(num), list(notable))
    sample = others[np.linspace(0, others.size - 1, limit - len(notable)).astype(np.int64)]
    return np.union1d(list(notable), sample).astype(np.int64)


def quantise(grid: Grid, rows: IntArray, low: float, high: float) -> npt.NDArray[np.uint16]:
    """Cells as 16-bit codes: 0 .. LEVELS for log10 between low and high, the rest for what has no logarithm."""
    log10, state = grid.log10[rows], grid.state[rows]
    finite = np.isfinite(log10)
    scaled = (np.where(finite, log10, low) - low) / max(high - low, 1e-9) * LEVELS
    codes = np.clip(np.rint(scaled), 0, LEVELS).astype(np.uint16)
    codes[np.isneginf(log10)] = ZERO
    codes[~finite & ~np.isneginf(log10)] = CODE_MISSING
    codes[state == MISSING] = CODE_MISSING
    codes[state == INF] = CODE_INF
    codes[state == NAN] = CODE_NAN
    return codes


def _fault(diagnosis: Diagnosis | None) -> dict[str, Any] | None:
    if diagnosis is None:
        return None
    what = "NaN" if diagnosis.origin.kind == "nan" else "Inf"
    step = diagnosis.origin.step
    return {"step": step, "kind": diagnosis.origin.kind, "label": f"first {what} \N{MIDDLE DOT} step {count(step)}"}


def _panel(panel: Panel, pack: Pack) -> dict[str, Any]:
    return {
        "title": panel.title,
        "log": panel.logarithmic,
        "steps": pack.add(panel.steps.astype("<u4")),
        "curves": [
            {
                "label": curve.label,
                "values": pack.add(_single(curve.values)),
                "gaps": curve.gaps,
                "sparse": curve.sparse,
            }
            for curve in panel.curves
        ],
    }


def _single(values: FloatArray) -> npt.NDArray[np.float32]:
    """Values in single precision; what is not finite is a gap, what is too large the largest."""
    largest = np.finfo(np.float32).max
    return np.clip(np.where(np.isfinite(values), values, np.nan), -largest, largest).astype("<f4")


def _map(layer_map: LayerMap, origin: Origin | None, limit: int, pack: Pack) -> dict[str, Any]:
    keep = origin_row(layer_map, origin) if origin else None
    rows = chosen_rows(layer_map, keep, limit)
    finite = layer_map.overview.log10[rows]
    finite = finite[np.isfinite(finite)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    kept = set(rows.tolist())
    grids = [_grid(grid, rows, low, high, pack) for grid in (layer_map.overview, *layer_map.windows)]
    notable = [growth.row for growth in layer_map.growth] + np.argsort(layer_map.facts.lowest_headroom).tolist()
    largest = next((row for row in notable if row in kept), 0)
    position = {row: index for index, row in enumerate(rows.tolist())}
    return {
        "role": layer_map.role,
        "label": role_name(layer_map.role),
        "names": [printable(layer_map.names[row]) for row in rows],
        "first": [layer_map.facts.first_nonfinite[row] for row in rows],
        "early": [None if np.isnan(layer_map.early[row]) else round(float(layer_map.early[row]), 3) for row in rows],
        "low": low,
        "high": high,
        "overview": grids[0],
        "windows": grids[1:],
        "origin": position.get(keep) if keep is not None else None,
        "selected": position.get(keep if keep is not None else largest, 0),
        "total": len(layer_map.names),
        "omitted": _omitted(len(rows), len(layer_map.names)),
    }


def _omitted(shown: int, total: int) -> str:
    if shown == total:
        return ""
    return (
        f"{count(shown)} of {count(total)} tensors are drawn: those that went bad, those that grew most, and an even "
        "sample of the rest."
    )


def _grid(grid: Grid, rows: IntArray, low: float, high: float, pack: Pack) -> dict[str, Any]:
    codes = quantise(grid, rows, low, high)
    deltas = np.diff(codes, axis=1, prepend=np.uint16(0))  # modulo 2^16, and so much easier to compress
    planes = deltas.astype("<u2").view(np.uint8).reshape(-1, 2).T  # all low bytes, then all high bytes
    columns = grid.columns
    return {"start": columns.start, "width": columns.width, "num": columns.num, "data": pack.add(planes)}
