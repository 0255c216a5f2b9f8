"""The seam between the trainer and the toolkit: a monitor when there is one, else the same four policies by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn

from stabilitykit.errors import NonFiniteError, UsageError
from trainers.batch import Batch
from trainers.guards import all_finite

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
        check: look for non-finite values at all; a bare run without it never looks.
        on_nonfinite: `raise`, `skip` (undo the step), `rollback` (to the last good snapshot) or `record` (go on).
        record_every: steps between records of all tensors; 0 leaves it to the monitor's budget.
        max_skips: steps lost in a row after which the run ends all the same.
        snapshot_every: steps between a bare run's snapshots for `rollback`.
    """

    monitor: bool = True
    check: bool = True
    on_nonfinite: Policy = "raise"
    record_every: int = 0
    max_skips: int = 20
    snapshot_every: int = 25

    def __post_init__(self) -> None:
        if self.on_nonfinite not in get_args(Policy):
            raise UsageError(
                f"--on_nonfinite: got {self.on_nonfinite!r}, expected one of {', '.join(get_args(Policy))}"
            )
        if self.max_skips < 1:
            raise UsageError(f"--max_skips: got {self.max_skips}, expected 1 or more")


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
        owners: tuple[Stateful, ...] = (buffer, scaler, *stateful)
        return BareWatch(model, optimizer, config, scaler=scaler, stateful=owners, first_step=first_step)
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
        ),
        on_nonfinite=config.on_nonfinite,
        scaler=scaler if scaler.is_enabled() else None,
        stateful=(buffer, *stateful),
        replay_buffer=buffer,
    )
    return cast("Watch", monitor)


class BareWatch:
    """The four policies without a monitor: it tells that a step went wrong, never where."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: WatchConfig,
        *,
        scaler: torch.amp.GradScaler,
        stateful: Sequence[Stateful],
        first_step: int = 0,
    ) -> None:
        self.model = model
        self.scaler = scaler
        self.config = config
        self.owners: tuple[Stateful, ...] = (model, optimizer, *stateful)
        self.snapshot: list[Any] = []
        self.step_index = first_step - 1
        self.task = 0.0

    def replayable(self, step: StepFunction) -> StepFunction:
        """The step with its policy."""
        return (lambda batch: self.run(step, batch)) if self.config.check else step

    def run(self, step: StepFunction, batch: Batch) -> Tensor | None:
        """One step: bad inputs never reach the model, everything else is judged when the step is over."""
        self.step_index += 1
        self.take_snapshot()
        loss = None
        bad = "" if all_finite([batch.inputs]) else "inputs"
        if not bad:
            loss = step(batch)
            bad = self.first_bad(loss)
        return self.react(bad, loss) if bad else loss

    def take_snapshot(self) -> None:
        """Remember the state where the policy will want it back."""
        every = {"skip": 1, "rollback": self.config.snapshot_every}.get(self.config.on_nonfinite, 0)
        if every and (self.step_index % every == 0 or not self.snapshot):
            self.snapshot = [copy.deepcopy(owner.state_dict()) for owner in self.owners]

    def first_bad(self, loss: Tensor | None) -> str:
        """What is not finite, empty when all is well; overflown gradients are a scaler's own business."""
        gradients = [] if self.scaler.is_enabled() else [entry.grad for entry in self.model.parameters()]
        for name, tensors in (
            ("loss", [loss]),
            ("gradients", gradients),
            ("weights", self.model.parameters()),
            ("module buffers", self.model.buffers()),
        ):
            if not all_finite(tensors):
                return name
        return ""

    def react(self, bad: str, loss: Tensor | None) -> Tensor | None:
        """Do what the policy says."""
        if self.config.on_nonfinite == "record":
            return loss
        if self.config.on_nonfinite == "raise":
            raise NonFiniteError(
                f"step {self.step_index:,}, task {self.task:.0f}: {bad} not finite; --monitor 1 tells where it began"
            )
        for owner, state in zip(self.owners, self.snapshot, strict=True):
            owner.load_state_dict(copy.deepcopy(state))
        return None

    def log(self, **scalars: float) -> None:
        """Remember the task, for the message."""
        self.task = scalars.get("task", self.task)

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


class SkipCounter:
    """Counts steps that did not count, and ends a run that does nothing else; `record` goes on whatever happens."""

    def __init__(self, config: WatchConfig) -> None:
        endless = config.on_nonfinite == "record" or not config.check
        self.max_in_a_row = math.inf if endless else config.max_skips
        self.total = self.in_a_row = 0

    def __call__(self, loss: Tensor | None) -> None:
        """Take note of a step.

        Raises:
            NonFiniteError: too many in a row.
        """
        lost = loss is None or not math.isfinite(float(loss))
        self.total += lost
        self.in_a_row = self.in_a_row + 1 if lost else 0
        if self.in_a_row >= self.max_in_a_row:
            raise NonFiniteError(f"{self.in_a_row} steps in a row were not finite; lower --lr, or raise --max_skips")
