"""The curves of a report: which columns make a panel, thinned to what a screen can show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stabilitykit.analyse.columns import FloatArray, IntArray, is_dense, thin, went_nan
from stabilitykit.analyse.wording import printable
from stabilitykit.schema import STEP_ROW

if TYPE_CHECKING:
    import pandas as pd

    from stabilitykit.analyse.findings import Findings

MAX_CURVES = 8  # in one panel
MAX_LOGGED = 4  # panels for what the caller logged
MAX_GAPS = 200  # marks for values that are not finite
LOG_RANGE = 20.0  # a panel whose values span more than this factor gets a logarithmic axis


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: its values at the panel's steps, the spans of steps where it went NaN or Inf, whether it has gaps."""

    label: str
    values: FloatArray
    gaps: tuple[tuple[int, int, str], ...]
    sparse: bool


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves that share axes, and how to read them."""

    key: str
    title: str
    how: str
    logarithmic: bool
    steps: IntArray
    curves: tuple[Curve, ...]


def panels(findings: Findings) -> tuple[Panel, ...]:
    """Every panel that has data, in reading order."""
    steps = findings.steps
    scalars = [name for name in steps.columns if "/" in str(name)]
    terms = {name.removeprefix("loss/"): steps[name] for name in scalars if name.startswith("loss/")}
    rates = {f"group {name[3:]}": steps[name] for name in scalars if name.startswith("lr/")}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = steps["update_norm"] / steps["parameter_norm"]
    made = [
        _panel(findings, "loss", {"loss": steps["loss"]} | terms),
        _panel(findings, "gradient", _clipped(steps)),
        _panel(findings, "rate", {"group 0" if rates else "learning rate": steps["lr"]} | rates),
        _panel(findings, "ratio", {"update / parameter norm": ratio}),
        _panel(findings, "scale", {"loss scale": steps["loss_scale"]}),
        *(_panel(findings, "logged", {name: steps[name]}, name) for name in _logged(steps)[:MAX_LOGGED]),
    ]
    return tuple(panel for panel in made if panel is not None)


def nonfinite_spans(steps: IntArray, values: FloatArray) -> tuple[tuple[int, int, str], ...]:
    """Spans of consecutive rows that went NaN or Inf: first step, last step, `nan` or `inf`."""
    kind = np.where(went_nan(values), 1, np.where(np.isinf(values), 2, 0))
    if not kind.size:
        return ()
    bounds = np.concatenate(([0], np.flatnonzero(np.diff(kind)) + 1, [kind.size]))
    spans = [
        (int(steps[start]), int(steps[stop - 1]), "nan" if kind[start] == 1 else "inf")
        for start, stop in pairwise(bounds.tolist())
        if kind[start]
    ]
    return tuple(spans[:MAX_GAPS])


def _panel(findings: Findings, key: str, columns: dict[str, pd.Series], name: str = "") -> Panel | None:
    measured = {label: column.to_numpy(np.float64) for label, column in list(columns.items())[:MAX_CURVES]}
    measured = {label: values for label, values in measured.items() if np.isfinite(values).any()}
    if not measured:
        return None
    steps = findings.steps["step"].to_numpy(np.int64)
    kept = _kept(findings, steps, list(measured.values()))
    words = _WORDS[key]
    return Panel(
        key=key,
        title=printable(name) or words.title,
        how=words.how,
        logarithmic=_logarithmic(list(measured.values())),
        steps=steps[kept],
        curves=tuple(
            Curve(
                label=printable(label, 60),
                values=values[kept],
                gaps=nonfinite_spans(steps, values),
                sparse=not is_dense(values),
            )
            for label, values in measured.items()
        ),
    )


def _kept(findings: Findings, steps: IntArray, curves: Sequence[FloatArray]) -> IntArray:
    """Positions to draw: smallest and largest of each column, and every step inside a window."""
    column = findings.overview.of(steps) // -(-len(curves) // 2)  # many curves share the panel's room
    windows = [np.flatnonzero((steps >= window.start) & (steps < window.stop)) for window in findings.windows]
    return np.unique(np.concatenate([*(thin(values, column) for values in curves), *windows]))


def _logarithmic(curves: Sequence[FloatArray]) -> bool:
    finite = np.concatenate([values[np.isfinite(values)] for values in curves])
    positive = finite[finite > 0]
    return bool((finite >= 0).all()) and positive.size > 0 and float(positive.max() / positive.min()) > LOG_RANGE


def _clipped(steps: pd.DataFrame) -> dict[str, pd.Series]:
    before, after = steps["grad_norm"], steps["grad_norm_clipped"]
    acted = bool((after.notna() & (after != before)).any())
    return {"before clipping": before, "after clipping": after} if acted else {"gradient norm": before}


def _logged(steps: pd.DataFrame) -> list[str]:
    ours = {"attempt", "step", "rank", *(STEP_ROW.names or ())}
    names = [str(name) for name in steps.columns if steps[name].count() > 1]  # one value is no curve
    return [name for name in names if name not in ours and not name.startswith(("loss/", "lr/"))]


class _Words(NamedTuple):
    title: str
    how: str


_WORDS = {
    "loss": _Words(
        "Loss",
        "The loss of each step and the terms it is the sum of. A single spike that comes back is ordinary; a term "
        "that climbs while the others fall is the one to look at.",
    ),
    "gradient": _Words(
        "Gradient norm",
        "L2 norm over all gradients when backward ends, before clipping, and as the optimizer saw it. A norm that "
        "rises for many steps comes before most divergences; clipping hides it from the update, not from the network.",
    ),
    "rate": _Words(
        "Learning rate", "As the optimizer used it, a line a parameter group. Look for jumps at task boundaries."
    ),
    "ratio": _Words(
        "Update ratio",
        "Norm of the update over norm of the parameters. Around 1e-3 is usual; near 1e-1 the optimizer rewrites the "
        "network at each step, below 1e-5 it hardly moves it.",
    ),
    "scale": _Words(
        "Loss scale",
        "The GradScaler's factor. It halves when a gradient overflows and doubles after a quiet stretch; a fall "
        "without end means that gradients overflow at any scale.",
    ),
    "logged": _Words("Logged", "Logged by the training script."),
}
