"""What a user may set of a monitor, and the presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from stabilitykit.errors import UsageError

CADENCES = (1, 2, 5, 10, 20, 50, 100)
ON_NONFINITE = ("raise", "skip", "rollback", "record")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Options of `attach`, most important first.

    Attributes:
        cadence: record tensors every so many steps; None: as often as `budget` allows, among 1, 2, 5, ... 100.
        budget: share of a step's own time that watching may take when `cadence` is None; the sentinel is the floor.
        replays: faults of a run that are replayed in full; later ones are events.
        max_consecutive_skips: under `skip` and `rollback`, this many steps undone in a row end the run with an error.
        snapshot_every: copy the training state every so many steps; None: every 10, or as `snapshot_budget` allows.
        snapshot_budget: share of a step's own time that copying the state may take when `snapshot_every` is None.
        rollback_steps: under `rollback`, go back at least so many steps.
        history_bytes: memory for batches held since the last snapshot, by reference, and for a second snapshot; where
            batches fill it, the state is copied whatever `snapshot_budget` says, so that each step can be run again.
        run_up: steps before a fault that the diagnosis shows.
        audit_every: look through the replay buffer every so many steps; 0: never.
        outputs, output_gradients, parameters, gradients, optimizer_state, module_buffers: what is recorded.
        report: render `report.html` in a child process at a fault and at close.
        compact: turn the log into parquet parts in child processes, while the run goes on and at close.
        resume: go on in a run folder that exists, as its next attempt.
        first_step: number of this attempt's first step; what an earlier one recorded from there on counts as redone.
        seed: written into the run's facts.

    Raises:
        UsageError: a value is out of its range.
    """

    cadence: int | None = None
    budget: float = 0.02
    replays: int = 3
    max_consecutive_skips: int = 20
    snapshot_every: int | None = None
    snapshot_budget: float = 0.005
    rollback_steps: int = 20
    history_bytes: int = 64 << 20
    run_up: int = 32
    audit_every: int = 50
    outputs: bool = True
    output_gradients: bool = True
    parameters: bool = True
    gradients: bool = True
    optimizer_state: bool = False
    module_buffers: bool = True
    report: bool = True
    compact: bool = True
    resume: bool = False
    first_step: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges once."""
        for name, least in _LEAST.items():
            value = getattr(self, name)
            kind = (int, float) if isinstance(least, float) else int
            if value is None and getattr(type(self), name) is None:
                continue
            if not isinstance(value, kind) or isinstance(value, bool):
                whole = "a number" if isinstance(least, float) else "a whole number"
                raise UsageError(f"MonitorConfig: got {name}={value!r}, expected {whole} of at least {least}")
            if not value >= least:
                raise UsageError(f"MonitorConfig: got {name}={value}, expected at least {least}")

    @classmethod
    def of(cls, given: MonitorConfig | str | None) -> MonitorConfig:
        """A config, the name of a preset, or None for the default.

        Raises:
            UsageError: an unknown preset.
        """
        if isinstance(given, MonitorConfig):
            return given
        name = given or "default"
        if not isinstance(name, str) or name not in PRESETS:
            raise UsageError(f"attach: got config {name!r}, expected a MonitorConfig or one of {', '.join(PRESETS)}")
        return PRESETS[name]

    def replace(self, **changes: object) -> MonitorConfig:
        """A copy with some options changed."""
        known = {entry.name for entry in fields(self)}
        if unknown := set(changes) - known:
            raise UsageError(
                f"MonitorConfig: got {', '.join(sorted(unknown))}, expected one of {', '.join(sorted(known))}"
            )
        return replace(self, **changes)  # type: ignore[arg-type]


_LEAST: Mapping[str, float] = {
    "cadence": 1,
    "budget": 0.0,
    "replays": 0,
    "max_consecutive_skips": 1,
    "snapshot_every": 1,
    "snapshot_budget": 0.0,
    "rollback_steps": 1,
    "history_bytes": 0,
    "run_up": 0,
    "audit_every": 0,
    "first_step": 0,
}
PRESETS: Mapping[str, MonitorConfig] = {
    "light": MonitorConfig(cadence=100, output_gradients=False, parameters=False),
    "default": MonitorConfig(),
    "full": MonitorConfig(cadence=1, optimizer_state=True),
}
