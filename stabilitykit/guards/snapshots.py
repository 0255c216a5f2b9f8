"""The last good states of a run, for `StepValidation`: a state counts as good once the steps after it were sound."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabilitykit.containers import tensors_of
from stabilitykit.guards.checks import first_bad
from stabilitykit.guards.tensors import ModelTensors
from stabilitykit.random_states import RandomStates
from stabilitykit.snapshot import Snapshot, TrainingState

DEPTH = 3  # snapshots held for a rollback: one that is finite may already be on its way down


class GoodStates:
    """Takes snapshots every so many steps and goes back to the newest good one; when that does not help, further back.

    When a state that was gone back to proves no better, the random streams stay where they are at the next return,
    since the same draws would meet the same fate, and the caller may ask for an older state.

    Args:
        tensors: parameters and module buffers of the model, by name.
        model: parameters, module buffers and modes.
        optimizer: state and hyperparameters.
        stateful: what else a step changes: a scaler, a replay buffer, generators; see `TrainingState`.
        every: steps between snapshots.
        depth: snapshots held.
    """

    def __init__(
        self,
        tensors: ModelTensors,
        model: nn.Module,
        optimizer: Optimizer,
        stateful: Sequence[object],
        *,
        every: int,
        depth: int = DEPTH,
    ) -> None:
        self._tensors, self._optimizer, self._every = tensors, optimizer, every
        self._state = TrainingState(model, (optimizer,), stateful)
        self._states: deque[tuple[int, Snapshot]] = deque(maxlen=depth)
        self._candidate: tuple[int, Snapshot] | None = None
        self._due = 0
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._returned = False  # to the newest state, and none has proved good since

    def before_step(self, step: int) -> None:
        """Take a snapshot where one is due."""
        self._buffers = [(buffer, buffer.clone()) for buffer in self._tensors.buffers.values()]
        if self._candidate is None and step >= self._due and not self._corrupted():
            self._candidate = step, self._state.capture()
            self._due = step + self._every

    def step_was_sound(self) -> None:
        """The step that began in the newest snapshot was: the snapshot is good."""
        if self._candidate is not None:
            self._states.append(self._candidate)
            self._candidate, self._returned = None, False

    def undo(self) -> bool:
        """Back to the start of the step, random streams aside; False when that state was not good to begin with."""
        if self._candidate is None:
            return False
        streams = RandomStates.capture()
        self._state.restore(self._candidate[1])
        streams.restore()
        self._candidate, self._due = None, 0
        return True

    def undo_forward(self) -> None:
        """Put back what a step without an update has changed: module buffers; random streams stay where they are."""
        self._candidate, self._due = None, 0
        with torch.no_grad():
            for buffer, held in self._buffers:
                buffer.copy_(held)

    def roll_back(self, *, further: bool) -> int | None:
        """Restore the last good state; the step it began, or None when there is none yet.

        Args:
            further: take an older one if the last has been gone back to already.
        """
        self._candidate, self._due = None, 0
        if further and self._returned and len(self._states) > 1:
            self._states.pop()
        if not self._states:
            return None
        streams = RandomStates.capture()
        step, snapshot = self._states[-1]
        self._state.restore(snapshot)
        if self._returned:
            streams.restore()
        self._returned = True
        return step

    def _corrupted(self) -> bool:
        """A state with a NaN in it is none to come back to; a bad momentum shows in the weights only a step later."""
        held: list[tuple[str, Any]] = [*self._tensors.parameters.items(), *self._tensors.buffers.items()]
        held += [entry for state in self._optimizer.state.values() for entry in tensors_of(dict(state))]
        return bool(first_bad(held))
