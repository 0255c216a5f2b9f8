"""What a run says of itself, as lines of a report: results, command, versions, cadence, cost, damage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stabilitykit.analyse.results import reported_results
from stabilitykit.analyse.wording import count, listed, number, plural, printable

if TYPE_CHECKING:
    import pandas as pd

    from stabilitykit.analyse.findings import Findings
    from stabilitykit.read import Run

MAX_ENTRIES = 40
MAX_CADENCES = 3
_SHOWN_ELSEWHERE = {"guards", "command", "seed"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One entry of what the script reported: a text, or rows of a table."""

    name: str
    text: str
    rows: tuple[tuple[str, ...], ...] = ()


def results(run: Run) -> tuple[Result, ...]:
    """What the script reported: numbers as numbers, a list of lists as a table; what is shown elsewhere left out."""
    entries = [(name, value) for name, value in reported_results(run).items() if name not in _SHOWN_ELSEWHERE]
    return tuple(_result(str(name), value) for name, value in entries[:MAX_ENTRIES])


def notices(run: Run, findings: Findings) -> tuple[str, ...]:
    """What is missing from the record and thereby from the report."""
    told = [printable(sentence, 600) for sentence in run.damage[:MAX_ENTRIES]]
    if len(run.damage) > MAX_ENTRIES:
        told.append(f"... and {plural(len(run.damage) - MAX_ENTRIES, 'more notice')} of damage.")
    if findings.num_ranks > 1:
        told.append(f"Curves and maps show rank {findings.rank} of {findings.num_ranks}; the tables hold every rank.")
    return tuple(told)


def run_facts(run: Run, findings: Findings) -> dict[str, str]:
    """Name and text of each fact, in reading order; unknown ones are left out."""
    meta, host = run.meta, _mapping(run.meta.get("host"))
    versions = _mapping(meta.get("versions"))
    modules = [module for module in meta.get("modules") or [] if isinstance(module, Mapping)]
    facts = {
        "Started": str(meta.get("created") or "").replace("T", " ").replace("+00:00", " UTC"),
        "Attempts": count(len(meta.get("attempts") or [])) if len(meta.get("attempts") or []) > 1 else "",
        "Seed": "" if meta.get("seed") is None else str(meta["seed"]),
        "Device": str(meta.get("device") or ""),
        "Host": ", ".join(filter(None, (str(host.get("platform") or ""), _cpus(host.get("cpu_count"))))),
        "Versions": ", ".join(f"{name} {version}" for name, version in list(versions.items())[:MAX_ENTRIES]),
        "Model": f"{plural(len(modules), 'module')}" if modules else "",
        "Tensors recorded": _cadence(findings.steps),
        "Cost of watching": _cost(findings.steps),
        "Configuration": _settings(_mapping(meta.get("config"))),
        "Run folder": str(run.path),
    }
    return {name: printable(text, 1_000) for name, text in facts.items() if text}


def _result(name: str, value: Any) -> Result:
    if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        rows = tuple(tuple(_text(cell) for cell in row[:MAX_ENTRIES]) for row in value[:MAX_ENTRIES])
        return Result(name=name, text="", rows=rows)
    return Result(name=name, text=_text(value))


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int | float):
        return number(float(value) + 0.0)  # no -0
    if isinstance(value, list):
        return ", ".join(_text(entry) for entry in value[:MAX_ENTRIES])
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in list(value.items())[:MAX_ENTRIES])
    return printable(str(value))


def _settings(config: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {_text(value)}" for name, value in list(config.items())[:MAX_ENTRIES])


def _cadence(steps: pd.DataFrame) -> str:
    used = [int(cadence) for cadence in np.unique(steps["cadence"]) if cadence > 0]
    if not used:
        return ""
    if len(used) > MAX_CADENCES:
        return f"every {count(used[0])} to {count(used[-1])} steps, as the cost budget allowed"
    ordinals = ["every step" if cadence == 1 else f"every {count(cadence)} steps" for cadence in used]
    return listed(ordinals, 5)


def _cost(steps: pd.DataFrame) -> str:
    spent, total = float(steps["cost_seconds"].sum()), float(steps["seconds"].sum())
    return f"{number(100 * spent / total, 3)} % of the steps' own time" if total > 0 and spent > 0 else ""


def _cpus(cpus: object) -> str:
    return plural(cpus, "CPU") if isinstance(cpus, int) else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
