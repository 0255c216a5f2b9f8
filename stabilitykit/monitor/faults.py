"""From a suspicion to what becomes of the step: inquiry, diagnosis, and the act that `on_nonfinite` asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from stabilitykit.config import MonitorConfig
from stabilitykit.diagnose.conclude import Context
from stabilitykit.diagnose.hooks import by_hooks
from stabilitykit.measure.values import is_finite
from stabilitykit.monitor import wording
from stabilitykit.monitor.bystanders import bystanders_put_back
from stabilitykit.monitor.history import History
from stabilitykit.monitor.inquiry import Inquiry, Outcome, Ran
from stabilitykit.monitor.ledger import Ledger, Rows
from stabilitykit.monitor.run_up import RunUp
from stabilitykit.monitor.skips import Skips
from stabilitykit.monitor.unwrapped import is_compiled, not_repeated, only_compiled, symptoms
from stabilitykit.monitor.watched import Watched
from stabilitykit.schema import Diagnosis
from stabilitykit.snapshot import Snapshot, TrainingState
from stabilitykit.watch.buffer import bad_slots
from stabilitykit.watch.reading import Reading

OnNonFinite = Literal["raise", "skip", "rollback", "record"]


@dataclass(frozen=True, kw_only=True)
class Act:
    """What becomes of a step that was looked into.

    Attributes:
        skipped: its update did not happen, or was undone.
        undone: the caller gets None for it.
        settles: the steps after it may be run again from a snapshot before it.
        fatal: the run ends here with this diagnosis.
        why: how the message of that error begins.
    """

    skipped: bool = False
    undone: bool = False
    settles: bool = False
    fatal: Diagnosis | None = None
    why: str = ""


class Faults:
    """Looks into suspicious steps and leaves the state as `policy` wants it.

    Attributes:
        replaying: a step is being run again.
        diagnosis: the run's first, None while there is none.
    """

    def __init__(
        self,
        policy: OnNonFinite,
        config: MonitorConfig,
        *,
        state: TrainingState,
        history: History,
        watched: Watched,
        ledger: Ledger,
        run_up: RunUp,
        scaled: bool,
    ) -> None:
        self.replaying = False
        self.diagnosis: Diagnosis | None = None
        self._policy, self._config, self._scaled = policy, config, scaled
        self._state, self._history, self._watched = state, history, watched
        self._ledger, self._run_up = ledger, run_up
        self._constants = {n: b.detach().clone() for n, b in watched.model.named_buffers() if not is_finite(b)}
        self._skips = Skips(config.replays if scaled else 0)
        self._num_faults = self._num_consecutive = self._num_looks = self._num_other_raises = 0
        self._pending: Diagnosis | None = None  # of gradients that no optimizer has used yet

    def suspects(self, ran: Ran) -> bool:
        """Whether a step has to be looked into; asked once a step."""
        if ran.raised is not None and not ran.reading.suspicious:  # some loops raise to leave a step, in every one
            return ran.may_be_numerical and self._num_other_raises < self._config.replays
        return ran.is_doubtful or (not self._num_faults and self._skips.odd(ran.reading))

    def look_into(self, ran: Ran, index: int, *, unheld: Exception | None = None) -> Act:
        """Something looks non-finite, or the step raised: find out, and put the state where it goes on from.

        Args:
            ran: the step.
            index: its number.
            unheld: why the state before it was not held, where it was not: it can then not be run again.
        """
        if ran.raised is None and self._num_faults >= self._config.replays:
            return self._act_briefly(ran, index, unheld)
        if unheld is not None:
            outcome = Outcome(None, None, None, unheld)
        else:
            with self._looking_back(index) as inquiry:
                outcome = inquiry.hold(ran, partial(self.facts, index))
        if outcome.failure is not None:
            self._ledger.own_error(outcome.failure)
        diagnosis = outcome.diagnosis or self._without_replay(outcome, ran, index)
        if diagnosis is None:
            return self._acquit(outcome, ran)
        if self._pending is not None and not diagnosis.origin.op and diagnosis.origin.phase == "backward":
            diagnosis = self._pending  # the gradient was bad when the step began: it went bad in an earlier one
        if self._policy == "skip" and not outcome.exact:
            diagnosis = replace(diagnosis, remedies=(*diagnosis.remedies, wording.GONE_BACK_OTHERWISE))
        self.conclude(diagnosis, index)
        return self._act(outcome, diagnosis, index)

    def note_gradients(self, ran: Ran, index: int, *, held: bool) -> None:
        """Say of a step that is no fault what became of its bad gradients; `held`: it can be run again."""
        if held and ran.reading.unused_gradients:
            self._note_unused(ran, index)
        if ran.reading.mended_gradients:
            self._ledger.event(wording.mended_gradients(ran.reading))

    def _note_unused(self, ran: Ran, index: int) -> None:
        """Gradients are bad and no optimizer stepped: no fault, unless a later step of an accumulation uses them."""
        self._ledger.event(wording.unused_gradients(ran.reading, scaled=self._scaled))
        if self._scaled or self._pending is not None or self._num_looks >= self._config.replays:
            return
        self._num_looks += 1
        with self._looking_back(index) as inquiry:
            outcome = inquiry.hold(ran, partial(self.facts, index), unused=True)
        self._put_back(outcome.after)
        self._history.forget()
        self._pending = outcome.diagnosis

    def conclude(self, diagnosis: Diagnosis, index: int) -> None:
        """There is a fault: write it down."""
        self._num_faults += 1
        self.diagnosis = self.diagnosis or diagnosis
        self._ledger.fault(index, diagnosis)

    def conclude_briefly(self, reading: Reading) -> None:
        """A fault after the first few: an event."""
        self._num_faults += 1
        self._ledger.event(wording.later_fault(reading))

    @property
    def enough(self) -> bool:
        """Whether the run has as many diagnoses as it may have, without a replay: one is always made."""
        return self._num_faults >= max(self._config.replays, 1)

    def facts(self, index: int) -> Mapping[str, Any]:
        """The part of a diagnosis' context that is known without looking."""
        ledger = self._ledger
        return {"step": index, "task": ledger.task, "sample_ids": ledger.samples, "run_up": self._run_up.steps()}

    def step_ended(self, reading: Reading, *, skipped: bool) -> None:
        """Whatever became of it, the next step begins."""
        if not skipped:
            self._num_consecutive = 0
        if not reading.bad_gradients:
            self._pending = None

    def close(self) -> None:
        """Let go of what was watched."""
        del self._state, self._history, self._watched, self._constants

    # To a diagnosis.

    @contextmanager
    def _looking_back(self, index: int) -> Iterator[Inquiry]:
        """Steps run in the block are replays: their tensors are recorded in full where they were not the first time."""
        watch = self._watched.watch
        rows = {index: watch.take_rows()}
        self.replaying = True
        inquiry = Inquiry(
            state=self._state,
            history=self._history,
            subject=self._watched.subject,
            constants=self._constants,
            begin=self._begin_again,
            read=partial(self._read_again, rows, index),
            discard=self._measured,
            late_writes=watch.late_writes,
            goes_back=self._policy != "record",
        )
        try:
            with bystanders_put_back():
                yield inquiry
        finally:
            self.replaying = False
            watch.forget()
            self._ledger.keep_dense(index, rows)

    def _begin_again(self, before: Snapshot | None) -> None:
        self._watched.losses.clear()
        copies = {id(live): held for live, held in before.tensors} if before is not None else {}
        parameters = self._watched.parameters
        self._watched.watch.begin_again({n: copies[id(p)] for n, p in parameters.items() if id(p) in copies})

    def _read_again(self, rows: dict[int, Rows | None], current: int, index: int, returned: Any) -> Reading:
        reading, taken = self._measured(returned)
        if index == current or not reading.suspicious:  # else it went otherwise than the first time
            rows[index] = taken
            self._run_up.describe_again(index, reading, self._watched.watch.largest)
        return reading

    def _measured(self, returned: Any) -> tuple[Reading, Rows | None]:
        watch, reading = self._watched.watch, self._watched.read(returned)
        watch.update_norm(max(reading.num_backwards - 1, 0))
        return reading, watch.take_rows()

    def _without_replay(self, outcome: Outcome, ran: Ran, index: int) -> Diagnosis | None:
        """Where the replay failed or did not show what the first run had shown: what can be seen without it."""
        if not ran.reading.suspicious or (outcome.failure is None and outcome.same):
            return None
        context = Context(proof="replayed-differs" if outcome.failure is None else "record", **self.facts(index))
        self._put_back(outcome.after)
        stored = bad_slots(self._watched.subject.replay_buffer)
        diagnosis = by_hooks(symptoms(self._watched.watch, ran.reading, stored), context)
        if outcome.failure is None and is_compiled(self._watched.model):
            return only_compiled(diagnosis)
        return not_repeated(diagnosis, outcome.failure, held=outcome.after is not None)

    # From a diagnosis to the act.

    def _put_back(self, held: Snapshot | None) -> None:
        try:
            if held is not None:
                self._state.restore(held)
        except Exception as error:  # noqa: BLE001 - training goes on
            self._ledger.own_error(error)

    def _acquit(self, outcome: Outcome, ran: Ran) -> Act:
        self._put_back(outcome.after)
        self._history.forget()
        self._watched.watch.acquit(ran.reading, ran.returned)
        self._num_other_raises += ran.raised is not None
        for event in wording.acquitted(ran.reading, scaled=self._scaled):
            self._ledger.event(event)
        return Act(skipped=ran.raised is not None)

    def _act_briefly(self, ran: Ran, index: int, unheld: Exception | None) -> Act:
        """A fault after the first few: what `on_nonfinite` says, without another diagnosis."""
        self.conclude_briefly(ran.reading)
        if self._policy == "record" or self.diagnosis is None:
            return Act(settles=True)
        if unheld is not None:
            return self._act(Outcome(None, None, None, unheld), self.diagnosis, index)
        with self._looking_back(index) as inquiry:
            outcome = inquiry.undo()
        return self._act(outcome, self.diagnosis, index)

    def _act(self, outcome: Outcome, diagnosis: Diagnosis, index: int) -> Act:
        self._history.forget()
        if self._policy == "record":
            self._put_back(outcome.after)
            return Act()
        if (back_to := self._history.unrepeated) is not None:
            self._ledger.event(wording.not_repeated(index, back_to))
        if self._policy == "raise":
            self._put_back(outcome.before)
            return Act(skipped=True, fatal=diagnosis)
        streams = self._state.moment().random
        self._put_back(outcome.before)
        began, good = self._history.last_good() or (None, None)
        if self._policy == "rollback":
            self._put_back(good)
            self._ledger.event(wording.rolled_back(index, began))
        if outcome.after is not None:
            self._state.restore_scheduled(outcome.after.moment)
        if good is None and back_to is None and not outcome.exact:
            self._ledger.event(wording.gone_back_otherwise(index))
        streams.restore()  # else the same random draws would meet the same fate
        self._num_consecutive += 1
        if self._num_consecutive < self._config.max_consecutive_skips:
            return Act(skipped=True, undone=True)
        why = f"{self._num_consecutive} steps in a row were undone; "
        return Act(skipped=True, undone=True, fatal=diagnosis, why=why)
