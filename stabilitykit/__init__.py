"""stabilitykit: where, when and why a PyTorch training run first went NaN or Inf.

    import stabilitykit as sk

    monitor = sk.attach(model, optimizer, run_dir="runs/exp1")
    train_step = monitor.replayable(train_step)

The half that reads runs never imports torch; the half that watches them is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabilitykit.config import MonitorConfig
    from stabilitykit.errors import NonFiniteError, RunFolderError, StabilityKitError, UnreadableRunError, UsageError
    from stabilitykit.monitor import Monitor, attach
    from stabilitykit.read import Run, open_run
    from stabilitykit.report import write_report
    from stabilitykit.schema import Diagnosis, Event, Origin
    from stabilitykit.watch.buffer import Finding, audit_buffer

__version__ = "0.1.0"

_HOMES = {
    "MonitorConfig": "stabilitykit.config",
    "NonFiniteError": "stabilitykit.errors",
    "RunFolderError": "stabilitykit.errors",
    "StabilityKitError": "stabilitykit.errors",
    "UnreadableRunError": "stabilitykit.errors",
    "UsageError": "stabilitykit.errors",
    "Monitor": "stabilitykit.monitor",
    "attach": "stabilitykit.monitor",
    "Run": "stabilitykit.read",
    "open_run": "stabilitykit.read",
    "write_report": "stabilitykit.report",
    "Diagnosis": "stabilitykit.schema",
    "Event": "stabilitykit.schema",
    "Origin": "stabilitykit.schema",
    "Finding": "stabilitykit.watch.buffer",
    "audit_buffer": "stabilitykit.watch.buffer",
}

__all__ = [
    "Diagnosis",
    "Event",
    "Finding",
    "Monitor",
    "MonitorConfig",
    "NonFiniteError",
    "Origin",
    "Run",
    "RunFolderError",
    "StabilityKitError",
    "UnreadableRunError",
    "UsageError",
    "__version__",
    "attach",
    "audit_buffer",
    "open_run",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home on first use (PEP 562)."""
    if name == "guards":  # a room of its own: `sk.guards.GradientClip`
        return importlib.import_module("stabilitykit.guards")
    if name not in _HOMES:
        raise AttributeError(f"module 'stabilitykit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
