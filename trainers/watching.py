"""The seam between the trainer and the toolkit's monitor, and who answers for a step that went wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from stabilitykit.errors import UsageError
from stabilitykit.guards import StepValidation
from trainers.batch import Batch

if TYPE_CHECKING:
    from trainers.buffer import ReplayBuffer

Policy = Literal["raise", "skip", "rollback", "record"]
StepFunction = Callable[[Batch], Tensor | None]


class Stateful(Protocol):
    """Anything a step changes."""

    def state_dict(self) -> Any:
        """Its state."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Put a state back."""


class Watch(Protocol):
    """What the trainer asks of a monitor."""

    def replayable(self, step: StepFunction, /) -> StepFunction:
        """The step, watched; None comes back where it was undone."""

    def log(self, **scalars: float) -> None:
        """Note where the run is, or any number."""

    def log_loss(self, **terms: Tensor) -> None:
        """Note the terms of the loss."""

    def log_samples(self, indices: Tensor, /) -> None:
        """Name the samples of the step's batch."""

    def log_event(self, kind: str, message: str, **data: Any) -> None:
        """Note something that happened once."""

    def note(self, **facts: Any) -> None:
        """Note facts about the whole run; anything JSON can hold."""

    def close(self, error: BaseException | None = None) -> None:
        """End of the run, and what ended it."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Who watches, and what happens to a step that is not finite (guard 6).

    Attributes:
        monitor: attach stabilitykit's monitor; False runs bare.
        check: guard 6; a bare run without it never looks.
        on_nonfinite: `raise`, `skip` (undo the step), `rollback` (to the last good snapshot) or `record` (go on).
        record_every: steps between records of all tensors; 0 leaves it to the monitor's budget.
        max_skips: steps lost in a row after which the run ends all the same.
        snapshot_every: steps between snapshots for `rollback`.
        report: let the monitor render its report and compact its log when the run ends.
        rollback_lr: share of the learning rate that the steps after a rollback train at.
    """

    monitor: bool = True
    check: bool = True
    on_nonfinite: Policy = "raise"
    record_every: int = 0
    max_skips: int = 20
    snapshot_every: int = 10
    rollback_lr: float = 1.0
    report: bool = True

    def __post_init__(self) -> None:
        if self.on_nonfinite not in get_args(Policy):
            raise UsageError(
                f"--on_nonfinite: got {self.on_nonfinite!r}, expected one of {', '.join(get_args(Policy))}"
            )
        if self.max_skips < 1:
            raise UsageError(f"--max_skips: got {self.max_skips}, expected 1 or more")
        if not 0 < self.rollback_lr <= 1:
            raise UsageError(f"--rollback_lr: got {self.rollback_lr}, expected above 0 and up to 1")

    @property
    def monitor_policy(self) -> Policy:
        """What the monitor does: where the guard undoes a step, the monitor diagnoses it and leaves it to the guard."""
        return "record" if self.check and self.on_nonfinite in ("skip", "rollback") else self.on_nonfinite

    def guard(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stateful: Sequence[object],
        num_classes: int,
        run_dir: Path,
    ) -> StepValidation | None:
        """Guard 6, where it is on."""
        if not self.check:
            return None
        return StepValidation(
            model,
            optimizer,
            policy=self.on_nonfinite,
            stateful=stateful,
            num_classes=num_classes,
            max_in_a_row=self.max_skips,
            snapshot_every=self.snapshot_every,
            lr_factor=self.rollback_lr,
            # A monitor can say more of a bad batch than that it is one, where nobody minds the harm it does.
            inspect_inputs=not self.monitor or self.on_nonfinite in ("skip", "rollback"),
            run_dir=run_dir,
        )


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: WatchConfig,
    *,
    run_dir: Path,
    seed: int,
    buffer: ReplayBuffer,
    scaler: torch.amp.GradScaler,
    stateful: Sequence[Stateful],
    resume_at: int | None = None,
) -> Watch:
    """A monitor on the run, or a bare watch; `resume_at`: the step an earlier attempt's checkpoint goes on with."""
    first_step = resume_at or 0
    if not config.monitor:
        return BareWatch()
    import stabilitykit

    monitor = stabilitykit.attach(
        model,
        optimizer,
        run_dir=run_dir,
        config=stabilitykit.MonitorConfig(
            seed=seed,
            cadence=config.record_every or None,
            max_consecutive_skips=config.max_skips,
            resume=resume_at is not None,
            first_step=first_step,
            report=config.report,
            compact=config.report,
        ),
        on_nonfinite=config.monitor_policy,
        scaler=scaler if scaler.is_enabled() else None,
        stateful=(buffer, *stateful),
        replay_buffer=buffer,
    )
    return cast("Watch", monitor)


class BareWatch:
    """No monitor: guard 6 tells that a step went wrong, never where."""

    def replayable(self, step: StepFunction) -> StepFunction:
        """The step."""
        return step

    def log(self, **scalars: float) -> None:
        """A bare run keeps no record."""

    def log_loss(self, **terms: Tensor) -> None:
        """A bare run keeps no record."""

    def log_samples(self, indices: Tensor) -> None:
        """A bare run names no samples."""

    def log_event(self, kind: str, message: str, **data: Any) -> None:
        """A bare run keeps no record."""

    def note(self, **facts: Any) -> None:
        """A bare run keeps no record."""

    def close(self, error: BaseException | None = None) -> None:
        """Nothing to close."""
