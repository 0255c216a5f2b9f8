"""What the training script reported of its own run: accuracies, what its guards did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabilitykit.read import Run

MAX_BYTES = 4 << 20  # of results.json: what is larger is no summary


def reported_results(run: Run) -> dict[str, Any]:
    """`results` of the run's metadata, else `results.json` of its folder, else nothing."""
    given = run.meta.get("results")
    if isinstance(given, Mapping):
        return dict(given)
    file = run.path / "results.json"
    try:
        body = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= MAX_BYTES else {}
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def reported_guards(run: Run) -> dict[str, int | None]:
    """Guards by name, with how often each acted where the script counted: `guards` of the results or the metadata."""
    given = reported_results(run).get("guards") or run.meta.get("guards") or {}
    if isinstance(given, list):
        return {str(name): None for name in given}
    counts = given.items() if isinstance(given, Mapping) else ()
    return {str(name): acted if isinstance(acted, int) else None for name, acted in counts}
