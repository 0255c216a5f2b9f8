"""The guards of a run, together: any of the eight, called in the order in which a step needs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, fields
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from stabilitykit.guards.batch_norm import BatchNormFreeze
from stabilitykit.guards.buffer import BufferSanitiser
from stabilitykit.guards.checks import gradient_norm
from stabilitykit.guards.clipping import GradientClip
from stabilitykit.guards.guard import Guard
from stabilitykit.guards.isolation import Isolation
from stabilitykit.guards.learning_rate import LearningRateSchedule
from stabilitykit.guards.precision import MixedPrecision
from stabilitykit.guards.replay_weights import AdaptiveReplayWeights
from stabilitykit.guards.validation import StepValidation

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(kw_only=True)
class Guards:
    """Any of the guards; one that is None does nothing.

        guards = Guards(validation=StepValidation(model, optimizer, policy="skip"), clip=GradientClip(1.0))
        train_step = guards.protect(train_step)  # within it: guards.update(optimizer, loss) instead of optimizer.step()
        for task, loader in enumerate(loaders):
            for batch in loader:
                guards.begin_step(optimizer, task)
                train_step(batch)
            guards.end_task(task)

    Attributes:
        learning_rate: guard 1, `lr`.
        precision: guard 2, `precision`.
        batch_norm: guard 3, `freeze_bn`.
        buffer: guard 4, `buffer`.
        isolation: guard 5, `isolation`.
        validation: guard 6, `checks`.
        clip: guard 7, `clip`.
        replay_weights: guard 8, `replay_weights`.
        on_event: where all of them say that they acted; None leaves each with its own.
    """

    learning_rate: LearningRateSchedule | None = None
    precision: MixedPrecision | None = None
    batch_norm: BatchNormFreeze | None = None
    buffer: BufferSanitiser | None = None
    isolation: Isolation | None = None
    validation: StepValidation | None = None
    clip: GradientClip | None = None
    replay_weights: AdaptiveReplayWeights | None = None
    on_event: InitVar[object | None] = None

    def __post_init__(self, on_event: object | None) -> None:
        if on_event is not None:
            self.listen(on_event)
        if self.validation is not None and self.precision is not None and self.precision.scaler.is_enabled():
            self.validation.scaled = True  # an overflow is the scaler's business, with `stateful` or without

    def __iter__(self) -> Iterator[Guard]:
        """Those that are there."""
        found = (getattr(self, field.name) for field in fields(self))
        return iter([guard for guard in found if guard is not None])

    def listen(self, on_event: object | None) -> None:
        """Let all of them say there what they do."""
        for guard in self:
            guard.listen(on_event)

    def begin_step(self, optimizer: Optimizer, task: int, *, within: float = 1.0) -> None:
        """Learning rate and frozen layers as they should be."""
        if self.learning_rate is not None:
            self.learning_rate.apply(optimizer, task, within=within)
        if self.batch_norm is not None:
            self.batch_norm.check()

    def update(self, optimizer: Optimizer, loss: Tensor, norm: float | None = None) -> bool:
        """Instead of `optimizer.step()`: unscale, check, clip, step; False where the step was refused.

        Args:
            optimizer: gradients are there, scaled where `precision` scales.
            loss: of the step.
            norm: of the true gradients, where they are unscaled and measured already.
        """
        parameters = [entry for group in optimizer.param_groups for entry in group["params"]]
        if norm is None:
            if self.precision is not None:
                self.precision.unscale(optimizer)
            norm = gradient_norm(entry.grad for entry in parameters if entry.grad is not None)
        if self.validation is not None and not self.validation.allows_update(loss, norm):
            if self.precision is not None:
                self.precision.skip(optimizer)
            return False
        overflown = self.precision is not None and self.precision.scaler.is_enabled() and not math.isfinite(norm)
        if self.clip is not None and not overflown:  # which is the scaler's business
            self.clip(parameters, norm)
        if self.precision is not None:
            self.precision.step(optimizer)
        else:
            optimizer.step()
        return True

    def end_task(self, task: int) -> None:
        """What is to happen after a task."""
        if self.batch_norm is not None:
            self.batch_norm.end_task(task)

    def protect(self, step: Callable[P, R], **options: Any) -> Callable[P, R | None]:
        """The step under validation, where there is one; options as `StepValidation.protect`."""
        return step if self.validation is None else self.validation.protect(step, **options)

    def counts(self) -> dict[str, int]:
        """How often each acted, by name."""
        return {guard.name: guard.num_acted for guard in self}

    def state_dict(self) -> dict[str, Any]:
        """The counts of all; a part of a checkpoint, or of a monitor's `stateful`."""
        return {guard.name: guard.state_dict() for guard in self}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the counts back."""
        for guard in self:
            guard.load_state_dict(state[guard.name])
