"""What happened when: tasks, the end of the run, events by kind, guards and how often each acted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from stabilitykit.analyse.wording import count, duration, plural, printable

if TYPE_CHECKING:
    from stabilitykit.analyse.columns import IntArray

SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True, kw_only=True)
class TaskSpan:
    """The steps of one task, last one included."""

    task: int
    first_step: int
    last_step: int


@dataclass(frozen=True, kw_only=True)
class EventGroup:
    """All events of one kind and severity, summed up; `example` is the first one's message."""

    kind: str
    severity: str
    num: int
    first_step: int
    last_step: int
    subjects: tuple[str, ...]
    example: str


@dataclass(frozen=True, kw_only=True)
class GuardCount:
    """How often a guard acted; 0 is worth saying of one that was on."""

    name: str
    acted: int
    first_step: int | None
    last_step: int | None
    example: str


@dataclass(frozen=True, kw_only=True)
class SkipCount:
    """Steps whose update was left out."""

    num: int
    first_step: int | None


def task_spans(steps: IntArray, tasks: IntArray) -> tuple[TaskSpan, ...]:
    """Spans of equal task number in step order; nothing where no step has a task."""
    known = tasks >= 0
    steps, tasks = steps[known], tasks[known]
    if not steps.size:
        return ()
    starts = np.concatenate(([0], np.flatnonzero(np.diff(tasks)) + 1))
    stops = np.concatenate((starts[1:], [steps.size])) - 1
    return tuple(
        TaskSpan(task=int(tasks[start]), first_step=int(steps[start]), last_step=int(steps[stop]))
        for start, stop in zip(starts, stops, strict=True)
    )


def event_groups(events: pd.DataFrame) -> tuple[EventGroup, ...]:
    """Events by kind, the gravest first, then in order of first appearance; the guards' own are told elsewhere."""
    others = events[events["kind"] != "guard"]
    groups = [_event_group(str(kind), str(severity), rows) for (kind, severity), rows in _by(others)]
    return tuple(sorted(groups, key=lambda group: (_gravity(group.severity), group.first_step)))


def guard_counts(events: pd.DataFrame, reported: Mapping[str, int | None]) -> tuple[GuardCount, ...]:
    """How often each guard acted: as the script counted, else by its events (kind `guard`, the guard as subject)."""
    groups = {str(name): rows for name, rows in events[events["kind"] == "guard"].groupby("subject", sort=False)}
    names = dict.fromkeys([*reported, *groups])
    return tuple(_guard_count(name, reported.get(name), groups.get(name)) for name in names)


def skip_count(steps: pd.DataFrame) -> SkipCount:
    """Steps with no update: a scaler's skip, a step that was undone."""
    skipped = steps.loc[steps["skipped"] > 0, "step"]
    return SkipCount(num=len(skipped), first_step=int(skipped.min()) if len(skipped) else None)


def describe_ending(ending: str, last_step: int, facts: Mapping[str, Any], seconds: float, verdict: str) -> str:
    """How the run ended, at which step, and what that leaves; an error that repeats `verdict` is not told again."""
    if last_step < 0:
        return f"No step was recorded; the run {_HOW.get(ending, 'ended')}."
    took = f" after {duration(seconds)}" if seconds > 0 else ""
    steps = plural(last_step + 1, "step")
    if ending == "raised":
        error = str(facts.get("error") or "")
        told = f": {printable(error, 400)}" if error and verdict not in error else "."
        return f"The run raised at step {count(_step(facts, last_step))}{took}{told}"
    if ending == "killed":
        return (
            f"The process was killed{took}; the last step on disk is {count(last_step)}. "
            "Every step that was acknowledged before the kill is in this report."
        )
    if ending == "running":
        return f"The run is still going; step {count(last_step)} is the latest on disk."
    return f"The run completed {steps}{took.replace(' after', ' in')}."


_HOW = {"completed": "completed", "raised": "raised", "killed": "was killed", "running": "is still going"}


def _step(facts: Mapping[str, Any], last_step: int) -> int:
    step = facts.get("step")
    return step if isinstance(step, int) and step >= 0 else last_step


def _by(events: pd.DataFrame) -> Sequence[tuple[tuple[Any, Any], pd.DataFrame]]:
    return [(key, rows) for key, rows in events.groupby(["kind", "severity"], sort=False)]  # type: ignore[misc]


def _gravity(severity: str) -> int:
    return SEVERITIES.index(severity) if severity in SEVERITIES else len(SEVERITIES)


def _event_group(kind: str, severity: str, rows: pd.DataFrame) -> EventGroup:
    first = rows.sort_values("step", kind="stable").iloc[0]
    subjects = tuple(str(subject) for subject in rows["subject"].unique() if subject)
    return EventGroup(
        kind=kind,
        severity=severity,
        num=len(rows),
        first_step=int(rows["step"].min()),
        last_step=int(rows["step"].max()),
        subjects=subjects,
        example=str(first["message"]),
    )


def _guard_count(name: str, counted: int | None, rows: pd.DataFrame | None) -> GuardCount:
    if rows is None:
        return GuardCount(name=name, acted=counted or 0, first_step=None, last_step=None, example="")
    return GuardCount(
        name=name,
        acted=len(rows) if counted is None else counted,
        first_step=int(rows["step"].min()),
        last_step=int(rows["step"].max()),
        example=str(rows["message"].iloc[-1]),
    )
