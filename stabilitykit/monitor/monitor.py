"""The Monitor: what a training script calls, and the course of a step."""

from __future__ import annotations

import functools
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, ParamSpec, Self, TypeVar

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from stabilitykit.config import MonitorConfig
from stabilitykit.diagnose.conclude import Context
from stabilitykit.diagnose.hooks import by_hooks
from stabilitykit.diagnose.retrace import Subject
from stabilitykit.errors import NonFiniteError
from stabilitykit.measure.values import is_finite
from stabilitykit.monitor import wording
from stabilitykit.monitor.aftermath import Aftermath, abandoned
from stabilitykit.monitor.bystanders import bystanders_put_back
from stabilitykit.monitor.history import History, Step
from stabilitykit.monitor.inquiry import Inquiry, Outcome, Ran, refuse_deferred
from stabilitykit.monitor.ledger import Ledger, Rows
from stabilitykit.monitor.newcomers import Newcomers, take_in
from stabilitykit.monitor.run_up import RunUp
from stabilitykit.monitor.skips import Skips
from stabilitykit.monitor.unwrapped import is_compiled, is_doubtful, only_compiled, symptoms
from stabilitykit.schema import Diagnosis
from stabilitykit.snapshot import Snapshot, TrainingState
from stabilitykit.watch.buffer import bad_slots
from stabilitykit.watch.parameters import named_parameters, outline
from stabilitykit.watch.reading import Reading
from stabilitykit.watch.watch import Watch

P = ParamSpec("P")
R = TypeVar("R")
OnNonFinite = Literal["raise", "skip", "rollback", "record"]


class Monitor:
    """A watched run.  Made by `attach`.

    Attributes:
        run_dir: the run folder.
        replaying: True while a step is run again for a diagnosis: guard side effects of your own with it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        run_dir: Path,
        *,
        config: MonitorConfig,
        on_nonfinite: OnNonFinite,
        scaler: Any,
        stateful: Sequence[object],
        replay_buffer: object | None,
    ) -> None:
        self.run_dir = run_dir
        self.replaying = False
        self._config, self._policy = config, on_nonfinite
        self._scaler = scaler or next((entry for entry in stateful if isinstance(entry, GradScaler)), None)
        self._model = model
        extras = [entry for entry in (*stateful, scaler, replay_buffer) if entry is not None]
        self._state = TrainingState(model, optimizers, extras)
        self._optimizers = self._state.optimizers  # one list for all: some may join, or leave
        self._ledger = Ledger(run_dir.absolute(), model, config, replay_buffer)  # the script may change its directory
        self._aftermath = Aftermath(run_dir, config)
        self._history = History(self._state, config, keeps_good=on_nonfinite == "rollback")
        self._replay_buffer = replay_buffer
        self._watch_all()
        self._constants = {n: b.detach().clone() for n, b in model.named_buffers() if not is_finite(b)}
        self._run_up, self._skips = RunUp(config.run_up), Skips(config.replays if self._scaler is not None else 0)
        self._diagnosis: Diagnosis | None = None
        self._step_index = config.first_step
        self._mode: Literal["plain", "block", "replayable"] = "plain"
        self._inside = self._closed = self._concluded = False
        self._losses: dict[str, Tensor | float] = {}
        self._num_faults = self._num_consecutive = self._num_looks = 0
        self._pending: Diagnosis | None = None  # of gradients that no optimizer has used yet
        self._started = time.perf_counter()
        self._newcomers = Newcomers(model, self._optimizer_arrived)
        self._finalizer = weakref.finalize(self, abandoned, self._ledger, self._aftermath, self._newcomers)
        if is_compiled(model):
            self._ledger.event(wording.COMPILED)
        self._begin_step()

    # What a training script calls.

    def replayable(self, function: Callable[P, R]) -> Callable[P, R]:
        """Wrap a training step so that a failing one can be put back and run again; one call is one step.

        The function gets its batch as arguments and does zero_grad, forward, backward and the optimizer's step; what it
        returns is handed on (`skip` and `rollback` give None). Return the loss: it is checked as well.
        """
        refuse_deferred(function)
        self._mode = "replayable"

        @functools.wraps(function)
        def step(*args: P.args, **kwargs: P.kwargs) -> R:
            if self._inside or self._closed or self.replaying:
                return function(*args, **kwargs)
            return self._replayable_step(function, args, kwargs)  # type: ignore[no-any-return]

        return step

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of a loop that cannot be wrapped: the origin is then known to the module, not to the operation."""
        if self._closed:
            yield
            return
        self._mode = "block" if self._mode == "plain" else self._mode
        self._begin_step()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        if not self._closed:
            self._finish(self._judge_unwrapped(before_update=False))

    def log(self, *, task: int | None = None, epoch: int | None = None, **scalars: float | Tensor) -> None:
        """Record numbers of your own with the current step; `task` and `epoch` hold until they are set again."""
        if not self.replaying and not self._closed:
            self._ledger.log(task=task, epoch=epoch, scalars=scalars)

    def log_loss(self, **terms: float | Tensor) -> None:
        """Record the terms of the loss by name: each is checked, and a fault names the term it came through."""
        self._losses |= self._ledger.numbers("log_loss", terms)

    def log_samples(self, indices: Sequence[int] | Tensor) -> None:
        """Say which samples of the data set the rows of this step's batch are, so that a diagnosis can name them."""
        self._ledger.samples = indices.tolist() if isinstance(indices, Tensor) else list(indices)

    def log_event(self, kind: str, message: str, **data: Any) -> None:
        """Record something that happened: a guard that acted, a change of task."""
        if not self.replaying and not self._closed:
            self._ledger.event(wording.told(kind, message, **data))

    def note(self, **facts: Any) -> None:
        """Add facts to `run.json`: results, settings; anything JSON can hold."""
        if reason := self._ledger.run_file.update(facts):
            warnings.warn(wording.not_noted(reason), RuntimeWarning, stacklevel=2)

    @property
    def step_index(self) -> int:
        """0-based number of the current step, and of the next one between steps."""
        return self._step_index

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The run's first diagnosis, None while there is none."""
        return self._diagnosis

    @property
    def report(self) -> Path:
        """Where the HTML report is, or will be."""
        return self._aftermath.report

    def close(self, error: BaseException | None = None) -> None:
        """Take all hooks off, seal the record, write the parquet parts and the report.  Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._finalizer.detach()
        self._watch.close()
        self._newcomers.close()
        del self._model, self._optimizers, self._scaler, self._replay_buffer, self._parameters, self._constants
        del self._state, self._subject, self._history  # a monitor kept for its diagnosis keeps no model alive
        self._losses.clear()
        self._ledger.close(self._step_index - 1, error)
        self._aftermath.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def __deepcopy__(self, memo: object) -> Self:
        return self  # there is one record: a copy of the trainer that holds it shares it, its hooks are inert

    # A step.

    def _begin_step(self) -> None:
        self._losses.clear()
        self._concluded = False
        recording = self._ledger.begin_step(self._step_index)
        self._watch.begin(recording=recording, trailing=self._mode != "replayable")
        self._started = time.perf_counter()

    def _replayable_step(self, function: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entered = time.perf_counter()
        replayable = self._remember(args, kwargs)
        self._begin_step()
        self._ledger.cost(self._started - entered)
        self._inside = True
        returned, raised = None, None
        try:
            returned = function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - looked into, then raised again
            raised = error
        finally:
            self._inside = False
        seconds = time.perf_counter() - self._started
        if self._closed:  # by the step itself
            return Ran(function, args, kwargs, Reading(losses={}), returned, raised).outcome()
        ran = Ran(function, args, kwargs, self._read(returned), returned, raised)
        if replayable and (ran.is_doubtful or (not self._num_faults and self._skips.odd(ran.reading))):
            return self._suspect(ran)
        if replayable and ran.reading.unused_gradients:
            self._note_unused(ran)
        if ran.reading.mended_gradients:
            self._ledger.event(wording.mended_gradients(ran.reading))
        if raised is None:
            self._settle(ran.reading, seconds)
        self._finish(ran.reading, seconds)
        return ran.outcome()

    def _settle(self, reading: Reading, seconds: float) -> None:
        try:
            self._history.end(reading, seconds)
        except Exception as error:  # noqa: BLE001 - a stateful object of the caller's
            self._ledger.own_error(error)
            self._history.forget()

    def _watch_all(self) -> None:
        """Put the hooks on the model as it is now."""
        self._parameters = named_parameters(self._model, self._optimizers)
        self._outline = outline(self._parameters, self._optimizers)
        self._subject = Subject(self._model, self._optimizers, self._parameters, self._replay_buffer)
        self._watch = Watch(
            self._model,
            self._optimizers,
            self._parameters,
            self._ledger.recorder,
            self._config,
            on_error=self._ledger.own_error,
            on_update=self._update_begins,
            after_update=self._update_ended,
        )

    def _rewatch_if_changed(self) -> None:
        """A head was added, a layer thawed: the hooks of yesterday do not see it."""
        if outline(self._parameters, self._optimizers) != self._outline:
            self._watch.close()
            self._watch_all()
            self._history.forget()

    def _remember(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Hold what a replay would need; False where the state cannot be captured: the step then runs all the same."""
        try:
            self._rewatch_if_changed()
            self._history.begin(self._step_index, args, kwargs, touched=self._watch.touched())
        except Exception as error:  # noqa: BLE001 - a stateful object of the caller's; training goes on
            self._ledger.own_error(error)
            self._history.forget()
            return False
        return True

    def _read(self, returned: Any) -> Reading:
        started = time.perf_counter()
        try:
            return self._watch.read(returned, self._losses)
        except Exception as error:  # noqa: BLE001 - a measurement of ours
            self._ledger.own_error(error)
            return Reading(losses={}, stepped=True)
        finally:
            self._ledger.cost(time.perf_counter() - started)

    def _finish(self, reading: Reading, seconds: float | None = None, *, skipped: bool = False) -> None:
        """Write the step's rows and go on to the next number."""
        seconds = time.perf_counter() - self._started if seconds is None else seconds
        try:
            self._record(reading, seconds, skipped=skipped)
        except Exception as error:  # noqa: BLE001 - a measurement of ours: the step is counted, its rows are lost
            self._ledger.own_error(error)
        self._aftermath.tend(self._ledger.recorder.num_sealed)
        if not skipped:
            self._num_consecutive = 0
        if not reading.bad_gradients:
            self._pending = None
        self._step_index += 1

    def _record(self, reading: Reading, seconds: float, *, skipped: bool) -> None:
        started = time.perf_counter()
        update = self._watch.update_norm(max(reading.num_backwards - 1, 0))
        rows = self._watch.take_rows()
        largest = self._watch.largest if rows is not None else ("", math.nan)
        self._run_up.add(self._step_index, reading, largest)
        self._ledger.cost(time.perf_counter() - started)
        self._ledger.end_step(
            self._step_index,
            reading,
            rows,
            seconds=seconds,
            learning_rates=[float(g["lr"]) for o in self._optimizers for g in o.param_groups if "lr" in g],
            loss_scale=float(self._scaler.get_scale()) if self._scaler is not None else math.nan,
            update_norm=update,
            skipped=skipped or not reading.stepped,
        )

    # A suspicion.

    def _suspect(self, ran: Ran) -> Any:
        """Something looks non-finite, or the step raised: find out, then do what `on_nonfinite` says."""
        if ran.raised is None and self._num_faults >= self._config.replays:
            return self._act_briefly(ran)
        with self._looking_back() as inquiry:
            outcome = inquiry.hold(ran, self._facts)
        if outcome.failure is not None:
            self._ledger.own_error(outcome.failure)
        diagnosis = outcome.diagnosis or self._without_replay(outcome, ran)
        if diagnosis is None:
            self._state.restore(outcome.after)
            self._history.forget()
            self._watch.acquit(ran.reading, ran.returned)
            for event in wording.acquitted(ran.reading, scaled=self._scaler is not None):
                self._ledger.event(event)
            self._finish(ran.reading, skipped=ran.raised is not None)
            return ran.outcome()
        if self._pending is not None and not diagnosis.origin.op and diagnosis.origin.phase == "backward":
            diagnosis = self._pending  # the gradient was bad when the step began: it went bad in an earlier one
        self._conclude(diagnosis)
        return self._act(outcome, diagnosis, ran)

    def _without_replay(self, outcome: Outcome, ran: Ran) -> Diagnosis | None:
        """Where the replay failed or did not show what the first run had shown: what can be seen without it."""
        if not ran.reading.suspicious or (outcome.failure is None and outcome.same):
            return None
        context = Context(proof="replayed-differs" if outcome.failure is None else "record", **self._facts())
        self._state.restore(outcome.after)
        stored = bad_slots(self._subject.replay_buffer)
        diagnosis = by_hooks(symptoms(self._watch, ran.reading, stored), context)
        return only_compiled(diagnosis) if outcome.failure is None and is_compiled(self._model) else diagnosis

    def _note_unused(self, ran: Ran) -> None:
        """Gradients are bad and no optimizer stepped: no fault, unless a later step of an accumulation uses them."""
        self._ledger.event(wording.unused_gradients(ran.reading, scaled=self._scaler is not None))
        if self._scaler is not None or self._pending is not None or self._num_looks >= self._config.replays:
            return
        self._num_looks += 1
        with self._looking_back() as inquiry:
            outcome = inquiry.hold(ran, self._facts, unused=True)
        self._state.restore(outcome.after)
        self._history.forget()
        self._pending = outcome.diagnosis

    @contextmanager
    def _looking_back(self) -> Iterator[Inquiry]:
        """Steps run in the block are replays: their tensors are recorded in full where they were not the first time."""
        rows = {self._step_index: self._watch.take_rows()}
        self.replaying = True
        inquiry = Inquiry(
            state=self._state,
            history=self._history,
            subject=self._subject,
            constants=self._constants,
            begin=self._begin_again,
            read=partial(self._read_again, rows),
            late_writes=self._watch.late_writes,
            goes_back=self._policy != "record",
        )
        try:
            with bystanders_put_back():
                yield inquiry
        finally:
            self.replaying = False
            self._watch.forget()
            self._ledger.keep_dense(self._step_index, rows)

    def _begin_again(self, before: Snapshot | None) -> None:
        self._losses.clear()
        copies = {id(live): held for live, held in before.tensors} if before is not None else {}
        self._watch.begin_again({n: copies[id(p)] for n, p in self._parameters.items() if id(p) in copies})

    def _read_again(self, rows: dict[int, Rows | None], index: int, returned: Any) -> Reading:
        reading = self._read(returned)
        self._watch.update_norm(max(reading.num_backwards - 1, 0))
        taken = self._watch.take_rows()
        if index == self._step_index or not reading.suspicious:  # else it went otherwise than the first time
            rows[index] = taken
            self._run_up.describe_again(index, reading, self._watch.largest)
        return reading

    def _facts(self) -> Mapping[str, Any]:
        step, ledger = self._step_index, self._ledger
        return {"step": step, "task": ledger.task, "sample_ids": ledger.samples, "run_up": self._run_up.steps()}

    def _conclude(self, diagnosis: Diagnosis) -> None:
        self._num_faults += 1
        self._diagnosis = self._diagnosis or diagnosis
        self._ledger.fault(self._step_index, diagnosis, self._num_faults)

    def _act_briefly(self, ran: Ran) -> Any:
        """A fault after the first few: an event, and what `on_nonfinite` says, without another diagnosis."""
        self._num_faults += 1
        self._ledger.event(wording.later_fault(ran.reading))
        if self._policy == "record" or self._diagnosis is None:
            self._settle(ran.reading, 0.0)
            self._finish(ran.reading)
            return ran.returned
        with self._looking_back() as inquiry:
            outcome = inquiry.undo(ran)
        return self._act(outcome, self._diagnosis, ran)

    def _act(self, outcome: Outcome, diagnosis: Diagnosis, ran: Ran) -> Any:
        self._history.forget()
        if self._policy == "record":
            self._state.restore(outcome.after)
            self._finish(ran.reading)
            return ran.outcome()
        if (back_to := self._history.unrepeated) is not None:
            self._ledger.event(wording.not_repeated(self._step_index, back_to))
        if self._policy == "raise":
            self._state.restore(outcome.before)
            self._finish(ran.reading, skipped=True)
            raise self._error(diagnosis) from ran.raised
        streams = self._state.moment().random
        self._state.restore(outcome.before)
        if self._policy == "rollback":
            self._ledger.event(wording.rolled_back(self._step_index, self._history.roll_back()))
        streams.restore()  # else the same random draws would meet the same fate
        self._num_consecutive += 1
        self._finish(ran.reading, skipped=True)
        if self._num_consecutive >= self._config.max_consecutive_skips:
            raise self._error(diagnosis, f"{self._num_consecutive} steps in a row were undone; ")
        return None

    def _error(self, diagnosis: Diagnosis, prefix: str = "") -> NonFiniteError:
        self._ledger.flush()
        path = self._aftermath.render()
        return NonFiniteError(prefix + wording.message(diagnosis, path), diagnosis, path)

    # What the watch calls.

    def _optimizer_arrived(self, optimizer: Optimizer) -> None:
        """One that was not named to `attach` is about to step; one that a replay makes for itself is only watched."""
        if self.replaying and optimizer not in self._optimizers:
            self._watch.follow(optimizer)
        elif optimizer not in self._optimizers:
            self._watch.unseen(partial(take_in, optimizer, self._newcomers, self._state, self._watch, self._history))
            self._ledger.event(wording.new_optimizer(optimizer))

    def _update_begins(self, _optimizer: Optimizer) -> None:
        if self._mode != "replayable":
            self._judge_unwrapped(before_update=True)

    def _update_ended(self, optimizer: Optimizer) -> None:
        if self._mode == "plain" and optimizer is self._optimizers[0]:
            self._finish(self._judge_unwrapped(before_update=False))
            self._begin_step()

    # Without a replayable step.

    def _judge_unwrapped(self, *, before_update: bool) -> Reading:
        """Judge what is known so far: before the update, where harm can still be kept off, and when the step ends."""
        reading = self._read(None)
        if self._concluded or not is_doubtful(reading, self._model, self._watch):
            return reading
        self._concluded = True
        diagnosis = by_hooks(symptoms(self._watch, reading), Context(proof="hooks", **self._facts()))
        self._conclude(diagnosis)
        if self._policy == "raise":
            self._finish(reading, skipped=True)
            raise self._error(diagnosis)
        if before_update and self._policy in ("skip", "rollback"):
            for parameter in self._parameters.values():
                parameter.grad = None  # an optimizer passes over parameters without a gradient
        return reading
