"""Health of the replay buffer over a run: each measure when first audited, last, and at its worst."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

Worst = Literal["max", "min"]


@dataclass(frozen=True, kw_only=True)
class BufferMeasure:
    """One measure; `alarm` says that its worst value alone is a finding."""

    name: str
    how: str
    first: float
    last: float
    worst: float
    worst_step: int
    alarm: bool


def buffer_health(buffer: pd.DataFrame) -> tuple[BufferMeasure, ...]:
    """Every measure that was taken, the alarming ones first."""
    ordered = buffer.sort_values("step", kind="stable")
    measures = [_measure(ordered, column, *text) for column, text in _MEASURES.items()]
    return tuple(sorted(filter(None, measures), key=lambda measure: not measure.alarm))


def _measure(buffer: pd.DataFrame, column: str, name: str, worst: Worst, how: str) -> BufferMeasure | None:
    if column not in buffer:
        return None
    measured = buffer[column].astype(float)
    known = np.isfinite(measured) if column in _SIGNED else np.isfinite(measured) & (measured >= 0)  # -1: not counted
    rows = buffer[known]
    if rows.empty:
        return None
    values = rows[column].to_numpy(np.float64)
    position = int(np.argmax(values) if worst == "max" else np.argmin(values))
    return BufferMeasure(
        name=name,
        how=how,
        first=float(values[0]),
        last=float(values[-1]),
        worst=float(values[position]),
        worst_step=int(rows["step"].iloc[position]),
        alarm=column.startswith("bad_") and float(values[position]) > 0,
    )


_SIGNED = {"example_min", "example_max"}
_MEASURES: dict[str, tuple[str, Worst, str]] = {
    "filled": ("Slots filled", "max", "of the buffer's capacity"),
    "bad_examples": ("Slots with a bad example", "max", "examples with a NaN or Inf; a replay of one poisons the step"),
    "bad_logits": (
        "Slots with bad logits",
        "max",
        "stored logits with a NaN or Inf; distilling from them is a NaN",
    ),
    "bad_labels": ("Slots with a bad label", "max", "outside the classes, or not an integer"),
    "duplicates": ("Duplicates", "max", "filled slots whose example equals an earlier slot's"),
    "num_classes": ("Classes held", "min", "fewer than were seen: those are being forgotten"),
    "class_balance": ("Class balance", "min", "entropy of the labels over its maximum: 1 is even"),
    "least_held": ("Rarest class", "min", "slots of the class that has the fewest; replay hardly rehearses it"),
    "most_held": ("Commonest class", "max", "slots of the class that has the most"),
    "example_min": ("Least value of an example", "min", "a jump says that examples are stored in another scale"),
    "example_max": ("Largest value of an example", "max", "a jump says that examples are stored in another scale"),
    "example_absmax": ("Largest |example|", "max", "grows when examples are stored before normalisation"),
    "logit_absmax": ("Largest |logit|", "max", "teachers whose logits grow pull the student's along"),
    "logit_l2": ("Typical logit", "max", "root mean square"),
    "age": ("Mean age", "max", "steps since insertion"),
    "age_max": ("Greatest age", "max", "steps since the oldest slot was filled"),
    "age_share": (
        "Mean age of the run",
        "max",
        "0.5 where every example had the same chance; more: the buffer lives in the past, less: it forgets it",
    ),
    "teacher_drift": ("Teacher drift", "max", "root mean square between stored and current logits"),
    "teacher_agreement": (
        "Teacher agreement",
        "min",
        "share of slots in which stored and current logits rank the same class first",
    ),
}
