"""A run's findings for machines: one JSON object, NaN and Inf as strings."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stabilitykit.analyse.buffer import buffer_health
from stabilitykit.analyse.findings import Findings, analyse
from stabilitykit.analyse.results import reported_results
from stabilitykit.report.run_facts import notices
from stabilitykit.schema import SCHEMA_VERSION, plain

if TYPE_CHECKING:
    from stabilitykit.analyse.layer_map import LayerMap
    from stabilitykit.read import Run

MAX_ROWS = 100  # tensors of one kind of finding


def render(run: Run) -> str:
    """The findings as indented JSON text; every list that is cut has its full length beside it."""
    return json.dumps(plain(as_object(run, analyse(run))), indent=1, allow_nan=False) + "\n"


def as_object(run: Run, findings: Findings) -> dict[str, Any]:
    """The object that `render` prints."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run": str(run.path),
        "name": run.meta.get("name", ""),
        "level": findings.level,
        "headline": findings.headline,
        "ending": run.ending,
        "ending_sentence": findings.ending,
        "ending_facts": run.ending_facts,
        "last_step": run.last_step,
        "num_steps": len(findings.steps),
        "rank": findings.rank,
        "num_ranks": findings.num_ranks,
        "notes": list(findings.notes),
        "missing": list(notices(run, findings)),
        "diagnoses": [{"verdict": diagnosis.verdict} | asdict(diagnosis) for diagnosis in findings.diagnoses],
        "nearest_overflow": asdict(findings.nearest) if findings.nearest else None,
        "tensors": {layer_map.role: _tensors(layer_map) for layer_map in findings.maps},
        "tasks": [asdict(span) for span in findings.tasks],
        "events": [asdict(group) for group in findings.events],
        "guards": [asdict(guard) for guard in findings.guards],
        "skipped": asdict(findings.skipped),
        "buffer": [asdict(measure) for measure in buffer_health(run.buffer())],
        "results": reported_results(run),
    }


def _tensors(layer_map: LayerMap) -> dict[str, Any]:
    names, nonfinite = layer_map.names, layer_map.nonfinite
    return {
        "num": len(names),
        "num_nonfinite": len(nonfinite),
        "nonfinite": [{"name": name, "first_step": step} for step, name in nonfinite[:MAX_ROWS]],
        "num_grown": len(layer_map.growth),
        "grown": [
            {"name": names[growth.row], "began": growth.began, "decades": growth.decades, "last": growth.last}
            for growth in layer_map.growth[:MAX_ROWS]
        ],
        "countdowns": [
            {"name": names[entry.row], "headroom_bits": entry.headroom, "steps": math.ceil(entry.steps)}
            for entry in layer_map.countdowns[:MAX_ROWS]
        ],
    }
