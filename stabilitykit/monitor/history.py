"""The last steps, held so that they can be put back and run again: a snapshot, and how each step began."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from stabilitykit.config import CADENCES, MonitorConfig
from stabilitykit.containers import tensors_of
from stabilitykit.measure.values import is_finite
from stabilitykit.monitor.batches import copied, given_again, given_tensors, held_apart, taken_from
from stabilitykit.snapshot import Moment, Snapshot, TrainingState
from stabilitykit.watch.reading import Reading

Step = Callable[..., Any]
SHORTEST = (
    10  # steps between snapshots, where nothing forces one: these are also what a diagnosis can show of the run-up
)


@dataclass
class PastStep:
    """A step since the last snapshot: what it began with, and what it gave.  The batch is held by reference.

    Attributes:
        function: that did it; a GAN's two take turns.
        tensors: of the batch; their versions when the step began are in `versions`.
        cleared: parameters whose gradients the loop let go of before the step.
        copied: the batch is our copy, but for what cannot be copied.
    """

    index: int
    function: Step
    moment: Moment
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: Sequence[Tensor]
    versions: Sequence[int]
    cleared: Sequence[Tensor]
    copied: bool
    reading: Reading | None = None

    @property
    def num_bytes(self) -> int:
        """Memory held by the batch."""
        return sum(tensor.nbytes for tensor in self.tensors if tensor.layout == torch.strided)

    def hold_taken(self) -> int:
        """Count what the step took from iterators to the batch; the memory that it holds."""
        items = taken_from(self.args, self.kwargs)
        if not items:
            return 0
        taken = [tensor for _, tensor in tensors_of(items)]
        before = self.num_bytes
        self.tensors, self.versions = [*self.tensors, *taken], [*self.versions, *_versions(taken)]
        return self.num_bytes - before

    def batch_untouched(self) -> bool:
        """Whether the batch is still what the step was given: nobody has written into it."""
        return self.versions == _versions(self.tensors)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments for a re-run, which may write into them as well."""
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = given_again((self.args, self.kwargs))
        return copied(arguments) if self.copied else arguments


@dataclass
class Segment:
    """A snapshot and the steps that began after it."""

    snapshot: Snapshot
    steps: list[PastStep] = field(default_factory=list)


class History:
    """Takes snapshots at a cadence that keeps within its budget, and rewinds to the start of the current step.

    A snapshot is due when its cadence says so, when batches held by reference fill `history_bytes`, and whenever the
    state was changed between two steps (weights averaged, gradients made, a buffer filled by the caller), since a
    re-run could not repeat that.

    Attributes:
        unrepeated: the step that the last `rewind` stayed at, since the steps after it went bad when they were run
            again, which they had not; None where it came to the current one.
    """

    def __init__(self, state: TrainingState, config: MonitorConfig, *, keeps_good: bool = False) -> None:
        self._state = state
        self._every, self._budget, self._max_bytes = config.snapshot_every, config.snapshot_budget, config.history_bytes
        self._rollback_steps = config.rollback_steps if keeps_good else 0  # 0: nobody will roll back
        self._segments: deque[Segment] = deque()  # an earlier one is re-run as well, for its record
        self._good: tuple[int, Snapshot] | None = None  # what `rollback` goes back to
        self._next_good: tuple[int, Snapshot] | None = None
        self._freed: Snapshot | None = None  # of a run-up that was let go of
        self.unrepeated: int | None = None
        self._fingerprint: tuple[int, ...] = ()
        self._copy_batches = self._cut = False
        self._held_bytes = 0  # by the batches since the last snapshot
        self._snapshot_bytes = 0
        self._snapshot_seconds = 0.0
        self._step_seconds = 0.0

    @property
    def interval(self) -> int:
        """Steps from one snapshot to the next."""
        if self._every is not None:
            return self._every
        if not self._step_seconds:
            return SHORTEST
        wanted = max(self._affordable, SHORTEST)
        return next((cadence for cadence in CADENCES if cadence >= wanted), CADENCES[-1])

    @property
    def _affordable(self) -> float:
        """Steps from one snapshot to the next that keep to the budget."""
        return self._snapshot_seconds / max(self._budget * self._step_seconds, 1e-9)

    def begin(
        self, index: int, function: Step, args: tuple[Any, ...], kwargs: dict[str, Any], *, touched: bool = False
    ) -> None:
        """A step is about to run; `touched`: the caller knows of a change of state since the last one."""
        last = self._current.steps[-1:] if self._segments else ()
        if self._cut or any(past.reading is None for past in last):  # left half-way, by an exception
            self.forget()
        cleared = self._state.cleared_gradients()
        if touched or cleared is None or self._snapshot_due() or self._is_crowded():
            cleared = ()
            started = time.perf_counter()
            snapshot = self._state.capture(self._spare())
            self._snapshot_seconds = _smooth(self._snapshot_seconds, time.perf_counter() - started)
            self._snapshot_bytes = snapshot.num_bytes
            self._keep_good(index, snapshot)
            self._segments.append(Segment(snapshot))
            self._held_bytes = 0
            moment = snapshot.moment
        else:
            moment = self._state.moment()
        args, kwargs = copied((args, kwargs)) if self._copy_batches else held_apart((args, kwargs))
        tensors = given_tensors((*args, *kwargs.values()))
        past = PastStep(index, function, moment, args, kwargs, tensors, _versions(tensors), cleared, self._copy_batches)
        self._held_bytes += past.num_bytes
        self._current.steps.append(past)

    def end(self, reading: Reading, seconds: float) -> None:
        """The step is over and was good."""
        if self._segments and self._current.steps:
            self._current.steps[-1].reading = reading
            self._held_bytes += self._current.steps[-1].hold_taken()
            self._step_seconds = _smooth(self._step_seconds, seconds)
            if not self._copy_batches and not self._current.steps[-1].batch_untouched():  # it normalises it in place
                self._copy_batches = True
                self.forget()
        self._fingerprint = self._state.fingerprint()
        self._state.note_gradients()

    def forget(self) -> None:
        """The state has been put somewhere else: begin anew with a snapshot at the next step."""
        self._segments.clear()
        self._cut, self._freed = False, None

    def cut(self, *, updated: bool) -> None:
        """An optimizer joins within the current step: those before ran without it, and cannot be run again with it.

        Unless something was `updated` in this step, it can be put back by what is there now: parameters and optimizers
        are as the step found them, and gradients are its own. Module buffers have followed the forward; those that it
        spoilt come from the last snapshot.
        """
        self._cut = True
        if updated or len(self.recent()) <= 1:
            return
        parameters = set(map(id, self._state.parameters()))
        earlier = {id(live): held for live, held in self._current.snapshot.tensors if id(live) not in parameters}
        now = self._state.capture()
        begun = replace(
            now,
            tensors=tuple(
                (live, earlier[id(live)] if id(live) in earlier and not is_finite(held) else held)
                for live, held in now.tensors
            ),
            gradients=tuple((parameter, None, None) for parameter, _, _ in now.gradients),
        )
        self._segments = deque([Segment(begun, [self._current.steps[-1]])])

    def rewind(self, rerun: Callable[[PastStep], Reading]) -> bool:
        """Put the state back to the start of the current step, and let go of what led there.

        Args:
            rerun: runs a past step again and reads it.

        Returns:
            Whether every step on the way was bit-identical to its first run.
        """
        assert self._segments, "begin() comes before rewind()"
        exact = True
        current = self._current.steps[-1]
        while self._segments:
            exact = self.repeat(self._segments.popleft(), current, rerun)  # what came before does not matter
        return exact and current.batch_untouched()

    @property
    def has_room(self) -> bool:
        """Whether one snapshot more may be held."""
        return 2 * self._snapshot_bytes <= self._max_bytes

    def route(self) -> Sequence[Segment]:
        """What `rewind` goes by, and lets go of."""
        return tuple(self._segments)

    def repeat(self, segment: Segment, current: PastStep, rerun: Callable[[PastStep], Reading]) -> bool:
        """Restore a snapshot and repeat the steps after it, up to the current one; whether each was as it had been."""
        self._state.restore(segment.snapshot)
        self.unrepeated = None
        exact = True
        for past in segment.steps:
            self.set_out(past)
            if past is current:
                break
            again = rerun(past)
            same = past.reading is not None and past.reading.same_step(again)
            exact = exact and same and past.batch_untouched()
            if again.suspicious and not same:  # better an older state than one that never was
                self._state.restore(segment.snapshot)
                self._state.restore_moment(segment.steps[-1].moment)
                self.unrepeated = segment.steps[0].index
                break
        return exact

    def set_out(self, past: PastStep) -> None:
        """What lies between two steps: from the end of the one before to the start of this one."""
        self._state.restore_moment(past.moment)
        for parameter in past.cleared:
            parameter.grad = None

    def last_good(self) -> tuple[int, Snapshot] | None:
        """A good state, at least `rollback_steps` old where there is one, and the step it began."""
        return self._good or self._next_good

    def recent(self) -> Sequence[PastStep]:
        """The steps that can be run again, the current one last."""
        return [past for segment in self._segments for past in segment.steps]

    @property
    def _current(self) -> Segment:
        return self._segments[-1]

    def _snapshot_due(self) -> bool:
        if not self._segments or len(self._current.steps) >= self.interval:
            return True
        return self._state.fingerprint() != self._fingerprint

    def _is_crowded(self) -> bool:
        """Whether only a snapshot makes room for more batches; where it passes the budget, the run-up goes first."""
        if 2 * self._held_bytes <= self._max_bytes:
            return False
        if self._every is not None or len(self._current.steps) >= self._affordable:
            return True
        while len(self._segments) > 1:
            self._freed = self._segments.popleft().snapshot
        return self._held_bytes > self._max_bytes

    def _spare(self) -> Snapshot | None:
        """The snapshot that makes room for the next, unless it may yet be rolled back to.

        Two are kept where they are small, so that there is a run-up to show whenever a step goes bad.
        """
        most = 1 if self.has_room else 0
        spare, self._freed = self._freed, None
        while len(self._segments) > most:
            spare = self._segments.popleft().snapshot
        return self.unless_good(spare)

    def unless_good(self, snapshot: Snapshot | None) -> Snapshot | None:
        """A snapshot that may be written over; None for one that may yet be rolled back to."""
        return None if any(kept and kept[1] is snapshot for kept in (self._good, self._next_good)) else snapshot

    def _keep_good(self, index: int, snapshot: Snapshot) -> None:
        if not self._rollback_steps:
            return
        if self._next_good is None:
            self._good = self._next_good = (index, snapshot)
        elif index - self._next_good[0] >= self._rollback_steps:
            self._good, self._next_good = self._next_good, (index, snapshot)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _smooth(before: float, now: float) -> float:
    return now if not before else 0.9 * before + 0.1 * now
