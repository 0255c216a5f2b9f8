"""Everything a report says about a run, computed once; every reporter prints from this."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from stabilitykit.analyse.columns import Columns, detail_windows, overview_columns, went_nan
from stabilitykit.analyse.layer_map import LayerMap, layer_maps, tensor_batches
from stabilitykit.analyse.results import reported_guards
from stabilitykit.analyse.timeline import (
    EventGroup,
    GuardCount,
    SkipCount,
    TaskSpan,
    describe_ending,
    event_groups,
    guard_counts,
    skip_count,
    task_spans,
)
from stabilitykit.analyse.wording import count, factor, listed, number, plural, printable

if TYPE_CHECKING:
    from stabilitykit.read import Run
    from stabilitykit.schema import Diagnosis

Level = Literal["fault", "ended", "fine", "empty"]
WATCHED = {"loss": "loss", "grad_norm": "gradient norm", "parameter_norm": "parameter norm"}
TIGHT_BITS = 8.0  # of headroom: beside a fault, more than that is no news
OVERFLOWING_ROLES = ("input", "output", "output_gradient", "gradient", "parameter", "optimizer_state")


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """The tensor that came nearest to overflow."""

    name: str
    role: str
    step: int
    bits: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the tables of a run say.

    Attributes:
        level: `fault` when something non-finite did harm, `ended` when the run raised or was killed without one,
            `empty` when it recorded nothing.
        headline: the sentence every report opens with.
        rank: the process whose rows are shown, of `num_ranks`.
        ending: the sentence on how the run ended.
        notes: further sentences: headroom, growth, values that are not finite and did no harm.
        steps: a row a step, the last micro-batch of each, in step order.
        overview: the columns of every map and curve.
        windows: where each step has its own column.
        maps: layer x step, one a role.
    """

    level: Level
    headline: str
    rank: int
    num_ranks: int
    ending: str
    notes: tuple[str, ...]
    diagnoses: tuple[Diagnosis, ...]
    steps: pd.DataFrame
    overview: Columns
    windows: tuple[Columns, ...]
    maps: tuple[LayerMap, ...]
    tasks: tuple[TaskSpan, ...]
    events: tuple[EventGroup, ...]
    guards: tuple[GuardCount, ...]
    skipped: SkipCount
    nearest: Headroom | None


@lru_cache(maxsize=1)
def analyse(run: Run) -> Findings:
    """Read the tables of `run` and draw every conclusion the reports print; the last run's are kept."""
    every_rank = run.steps()
    rank = int(every_rank["rank"].min()) if len(every_rank) else 0
    steps = one_row_a_step(every_rank[every_rank["rank"] == rank])
    events = run.events()
    overview = overview_columns(run.last_step)
    windows = detail_windows(run.last_step, _finding_steps(run.diagnoses, first_nonfinite(steps, events)))
    batches = tensor_batches(run, rank, steps["step"].to_numpy(np.int64), steps["attempt"].to_numpy(np.int64))
    names = run.names(rank)
    maps = layer_maps(batches, dict(zip(names["id"].tolist(), names["name"], strict=True)), overview, windows)
    level, headline = _headline(run, steps, events, maps)
    nearest = nearest_overflow(maps)
    return Findings(
        level=level,
        headline=headline,
        rank=rank,
        num_ranks=max(every_rank["rank"].nunique(), 1),
        ending=describe_ending(run.ending, run.last_step, run.ending_facts, float(steps["seconds"].sum()), headline),
        notes=(*_headroom_notes(level, nearest, maps), *_growth_notes(maps), *_quiet_notes(level, maps)),
        diagnoses=tuple(run.diagnoses),
        steps=steps,
        overview=overview,
        windows=windows,
        maps=maps,
        tasks=task_spans(steps["step"].to_numpy(np.int64), steps["task"].to_numpy(np.int64)),
        events=event_groups(events),
        guards=guard_counts(events, reported_guards(run)),
        skipped=skip_count(steps),
        nearest=nearest,
    )


def one_row_a_step(steps: pd.DataFrame) -> pd.DataFrame:
    """The last row of each step (several micro-batches leave several), in step order."""
    ordered = steps.sort_values(["step", "micro"], kind="stable")
    return ordered.drop_duplicates("step", keep="last").reset_index(drop=True)


def first_nonfinite(steps: pd.DataFrame, events: pd.DataFrame) -> tuple[int, str] | None:
    """The first step at which something non-finite was noticed, and what; for runs that were not diagnosed.

    An Inf in a norm counts unless its step was skipped, as a scaler does, or the gradients were finite when the
    optimizer used them. A NaN may also mean "not measured", so it counts in the loss alone, and there only when the
    loss was known at nearly every step before.
    """
    skipped = steps["skipped"].to_numpy() > 0
    mended = np.isfinite(steps["grad_norm_clipped"].to_numpy(np.float64))
    found = [
        (int(step), str(message))
        for step, message, kind, severity in events[["step", "message", "kind", "severity"]].itertuples(index=False)
        if kind == "nonfinite" and severity == "error"
    ]
    for column, label in WATCHED.items():
        values = steps[column].to_numpy(np.float64)
        bad = np.isinf(values) & ~(skipped & (column != "loss")) & ~(mended & (column == "grad_norm"))
        bad |= went_nan(values) if column == "loss" else False
        if bad.any():
            position = int(np.argmax(bad))
            step = int(steps["step"].iloc[position])
            found.append((step, f"the {label} was {number(float(values[position]))}"))
    return min(found, key=lambda first: first[0], default=None)


def nearest_overflow(maps: Sequence[LayerMap]) -> Headroom | None:
    """The lowest headroom of any tensor, None where none was measured."""
    best: Headroom | None = None
    for layer_map in maps:
        bits = layer_map.facts.lowest_headroom
        if layer_map.role not in OVERFLOWING_ROLES or not np.isfinite(bits).any():
            continue
        row = int(np.nanargmin(np.where(np.isfinite(bits), bits, np.nan)))
        if best is None or bits[row] < best.bits:
            step = int(layer_map.facts.lowest_step[row])
            best = Headroom(name=layer_map.names[row], role=layer_map.role, step=step, bits=float(bits[row]))
    return best


def _finding_steps(diagnoses: Sequence[Diagnosis], first: tuple[int, str] | None) -> list[int]:
    return [diagnosis.origin.step for diagnosis in diagnoses] + ([first[0]] if first else [])


def _headline(run: Run, steps: pd.DataFrame, events: pd.DataFrame, maps: Sequence[LayerMap]) -> tuple[Level, str]:
    if run.diagnosis is not None:
        return "fault", run.diagnosis.verdict
    if not len(steps):
        return ("empty" if run.ending in {"completed", "running"} else "ended"), "No step was recorded"
    bad = first_nonfinite(steps, events)
    if bad is not None:
        return "fault", f"step {count(bad[0])}: {printable(bad[1])}, and no diagnosis was made"
    harmed = any(layer_map.nonfinite for layer_map in maps)
    sentence = "No non-finite value" + (" reached loss or parameters" if harmed else "")
    sentence += f" in {plural(len(steps), 'step')}"
    if run.ending == "killed":
        return "ended", f"{sentence}; the process was killed after step {count(run.last_step)}"
    if run.ending == "raised":
        return "ended", f"{sentence}; the run raised at step {count(run.ending_facts.get('step', run.last_step))}"
    return "fine", sentence


def _headroom_notes(level: Level, nearest: Headroom | None, maps: Sequence[LayerMap]) -> list[str]:
    if nearest is None or (level == "fault" and nearest.bits > TIGHT_BITS):
        return []
    times = "" if nearest.bits > 60 else f" (it could grow {factor(nearest.bits * math.log10(2))})"
    where = f"`{printable(nearest.name)}` ({role_name(nearest.role)})"
    below = f"{number(nearest.bits, 3)} bits below its dtype's maximum"
    notes = [f"Headroom: the value nearest to overflow was in {where} at step {count(nearest.step)}, {below}{times}."]
    soonest = min(
        ((entry.steps, layer_map, entry) for layer_map in maps for entry in layer_map.countdowns),
        key=lambda item: item[0],
        default=None,
    )
    if soonest is not None:
        steps, layer_map, entry = soonest
        where = f"`{printable(layer_map.names[entry.row])}` ({role_name(layer_map.role)})"
        rate = f"{number(1000 * entry.bits_per_step, 3)} bits per 1,000 steps"
        left = plural(round(steps), "step")
        notes.append(f"Countdown: {where} loses {rate} and overflows in about {left} if that goes on.")
    return notes


def _growth_notes(maps: Sequence[LayerMap]) -> list[str]:
    """The first role that grew, in the schema's order: what grows in the forward pass grows in the backward too."""
    layer_map = next((candidate for candidate in maps if candidate.growth), None)
    if layer_map is None:
        return []
    top = layer_map.growth[0]
    where = f"`{printable(layer_map.names[top.row])}` ({role_name(layer_map.role)})"
    grew = f"began to grow around step {count(top.began)} and ended at {number(top.last, 3)}"
    others = len(layer_map.growth) - 1
    more = f"; {plural(others, 'other tensor')} grew tenfold or more" if others else ""
    return [f"Growth: {where} {grew}, {factor(top.decades)} its early median{more}."]


def _quiet_notes(level: Level, maps: Sequence[LayerMap]) -> list[str]:
    if level == "fault":
        return []
    return [
        f"Not finite, and without harm to loss or parameters ({role_name(layer_map.role)}): "
        + listed([f"`{printable(name)}` from step {count(step)}" for step, name in layer_map.nonfinite])
        + ". A mask filled with -inf looks like this."
        for layer_map in maps
        if layer_map.nonfinite
    ]


def role_name(role: str) -> str:
    """A role as people say it: `output gradient`."""
    return role.replace("_", " ")
