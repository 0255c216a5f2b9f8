"""The Monitor: what a training script calls, and the course of a step."""

from __future__ import annotations

import functools
import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, ParamSpec, Self, TypeVar

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from stabilitykit.config import MonitorConfig
from stabilitykit.diagnose.conclude import Context
from stabilitykit.diagnose.hooks import by_hooks
from stabilitykit.errors import NonFiniteError
from stabilitykit.monitor import wording
from stabilitykit.monitor.aftermath import Aftermath, abandoned
from stabilitykit.monitor.batches import recorded
from stabilitykit.monitor.faults import Act, Faults, OnNonFinite
from stabilitykit.monitor.history import History, Step
from stabilitykit.monitor.inquiry import Ran, refuse_deferred
from stabilitykit.monitor.ledger import Ledger
from stabilitykit.monitor.newcomers import Newcomers, take_in
from stabilitykit.monitor.run_up import RunUp
from stabilitykit.monitor.unwrapped import (
    is_compiled,
    is_doubtful,
    of_one_rank,
    refuse_to_act_alone,
    spans_processes,
    symptoms,
)
from stabilitykit.monitor.watched import Watched
from stabilitykit.schema import Diagnosis
from stabilitykit.snapshot import TrainingState
from stabilitykit.watch.reading import Reading

P = ParamSpec("P")
R = TypeVar("R")


class Monitor:
    """A watched run.  Made by `attach`.

    Attributes:
        run_dir: the run folder.
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
        self._config, self._policy = config, on_nonfinite
        self._scaler = scaler or next((entry for entry in stateful if isinstance(entry, GradScaler)), None)
        extras = [entry for entry in (*stateful, scaler, replay_buffer) if entry is not None]
        self._state = TrainingState(model, optimizers, extras)
        self._optimizers = self._state.optimizers  # one list for all: some may join, or leave
        self._ledger = Ledger(run_dir.absolute(), model, config, replay_buffer)  # the script may change its directory
        self._state.on_error = self._ledger.own_error
        self._aftermath = Aftermath(run_dir, config)
        self._history = History(self._state, config, keeps_good=on_nonfinite == "rollback")
        self._run_up = RunUp(config.run_up)
        self._step_index = config.first_step
        self._mode: Literal["plain", "block", "replayable"] = "plain"
        self._inside = self._closed = self._concluded = self._several = False
        self._started = time.perf_counter()
        with ExitStack() as undo:  # what cannot be attached to leaves no hook and no folder
            undo.callback(self._ledger.run_file.withdraw)
            self._watched = Watched(
                model,
                self._optimizers,
                replay_buffer,
                self._ledger,
                config,
                on_update=self._update_begins,
                after_update=self._update_ended,
            )
            undo.callback(self._watched.close)
            self._faults = Faults(
                on_nonfinite,
                config,
                state=self._state,
                history=self._history,
                watched=self._watched,
                ledger=self._ledger,
                run_up=self._run_up,
                scaled=self._scaler is not None,
            )
            undo.pop_all()
        self._newcomers = Newcomers(model, self._optimizer_arrived)
        self._finalizer = weakref.finalize(self, abandoned, self._ledger, self._aftermath, self._newcomers)
        if is_compiled(model):
            self._ledger.event(wording.COMPILED)
        self._begin_step()

    # What a training script calls.

    def replayable(self, function: Callable[P, R]) -> Callable[P, R]:
        """Wrap a training step so that a failing one can be put back and run again; one call is one step.

        The function gets its batch as arguments and does zero_grad, forward, backward and the optimizer's step; what it
        returns is handed on (`skip` and `rollback` give None). Return the loss, alone, first in a tuple or as
        `loss` in a mapping: it is checked as well.
        """
        refuse_deferred(function)
        if self._mode == "plain":
            self._watched.watch.rest()
        self._mode = "replayable"

        @functools.wraps(function)
        def step(*args: P.args, **kwargs: P.kwargs) -> R:
            if self._inside or self._closed or self._faults.replaying:
                return function(*args, **kwargs)
            if self._is_one_of_several():
                return self._step_among_others(function, args, kwargs)  # type: ignore[no-any-return]
            return self._replayable_step(function, args, kwargs)  # type: ignore[no-any-return]

        return step

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of a loop that cannot be wrapped: the origin is then known to the module, not to the operation."""
        if self._closed:
            yield
            return
        self._mode = "block" if self._mode == "plain" else self._mode
        with self._one_step():
            yield
            if not self._closed:
                self._finish(self._judge_unwrapped(before_update=False))

    def log(self, *, task: int | None = None, epoch: int | None = None, **scalars: float | Tensor) -> None:
        """Record numbers of your own with the current step; `task` and `epoch` hold until they are set again."""
        if not self.replaying and not self._closed:
            self._ledger.log(task=task, epoch=epoch, scalars=scalars)

    def log_loss(self, **terms: float | Tensor) -> None:
        """Record the terms of the loss by name: each is checked, and a fault names the term it came through."""
        self._watched.losses |= self._ledger.numbers("log_loss", terms)

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
    def replaying(self) -> bool:
        """True while a step is run again for a diagnosis: guard side effects of your own with it."""
        return self._faults.replaying

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The run's first diagnosis, None while there is none."""
        return self._faults.diagnosis

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
        self._watched.close()
        self._newcomers.close()
        self._faults.close()
        del self._state, self._history, self._optimizers, self._scaler  # it may be kept, for its diagnosis
        self._ledger.close(self._step_index - 1, error)
        self._aftermath.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.close(error)

    def __deepcopy__(self, memo: object) -> Self:
        return self  # there is one record: a copy of the trainer that holds it shares it, its hooks are inert

    # A step.

    def _begin_step(self, *, trailing: bool = True) -> None:
        self._watched.losses.clear()
        self._concluded = False
        recording = self._ledger.begin_step(self._step_index)
        # A wrapped step's last act may be to move the scale; a plain loop's begins and ends before it is moved.
        self._scale = math.nan if self._mode == "plain" else self._ledger.loss_scale(self._scaler)
        self._watched.watch.begin(recording=recording, trailing=trailing)
        self._started = time.perf_counter()

    @contextmanager
    def _one_step(self) -> Iterator[None]:
        """What runs within is recorded, and nothing after it, also where it is broken off."""
        self._begin_step()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
            self._watched.watch.rest()

    def _replayable_step(self, function: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entered = time.perf_counter()
        args, kwargs = tuple(map(recorded, args)), {name: recorded(entry) for name, entry in kwargs.items()}
        unheld = self._remember(function, args, kwargs)
        self._begin_step(trailing=unheld is not None)
        self._ledger.cost(self._started - entered)
        self._inside = True
        returned, raised = None, None
        try:
            returned = function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - looked into, then raised again
            raised = error
        except BaseException:
            self._watched.watch.rest()
            raise
        finally:
            self._inside = False
        seconds = time.perf_counter() - self._started
        reading = Reading(losses={}) if self._closed else self._watched.read(returned)  # closed by the step itself
        ran = Ran(function, args, kwargs, reading, returned, raised)
        try:
            act = Act() if self._closed else self._conclude_step(ran, seconds, unheld)
            if act.fatal is not None:
                raise self._error(act.fatal, act.why) from raised
            return None if act.undone else ran.outcome()
        finally:
            del ran, raised, unheld  # a traceback holds this frame: in a cycle, all that the step has made would stay

    def _conclude_step(self, ran: Ran, seconds: float, unheld: Exception | None) -> Act:
        if self._faults.suspects(ran):
            act = self._faults.look_into(ran, self._step_index, unheld=unheld)
            if act.settles:
                self._settle(ran.reading, 0.0)
            self._finish(ran.reading, skipped=act.skipped)
            return act
        self._faults.note_gradients(ran, self._step_index, held=unheld is None)
        if ran.raised is None:
            self._settle(ran.reading, seconds)
        self._finish(ran.reading, seconds)
        return Act()

    def _is_one_of_several(self) -> bool:
        """Whether there are other processes to keep in step with; from then on for good."""
        if not self._several and spans_processes():
            refuse_to_act_alone(self._policy)
            self._several = True
            self._history.forget()
            self._ledger.event(wording.DISTRIBUTED)
        if self._several:
            self._mode = "block"  # whatever else was wrapped since
        return self._several

    def _step_among_others(self, function: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._one_step():
            returned = function(*args, **kwargs)
            if not self._closed:
                self._finish(self._judge_unwrapped(before_update=False, returned=returned))
        return returned

    def _settle(self, reading: Reading, seconds: float) -> None:
        try:
            self._history.end(reading, seconds)
        except Exception as error:  # noqa: BLE001 - a stateful object of the caller's
            self._ledger.own_error(error)
            self._history.forget()

    def _remember(self, function: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
        """Hold what a replay would need; why not, where the state cannot be captured: the step runs all the same."""
        try:
            if self._watched.look_again():
                self._history.forget()
            self._history.begin(self._step_index, function, args, kwargs, touched=self._watched.watch.touched())
        except Exception as error:  # noqa: BLE001 - a stateful object of the caller's; training goes on
            self._ledger.own_error(error)
            self._history.forget()
            return error
        return None

    def _finish(self, reading: Reading, seconds: float | None = None, *, skipped: bool = False) -> None:
        """Write the step's rows and go on to the next number."""
        seconds = time.perf_counter() - self._started if seconds is None else seconds
        try:
            self._record(reading, seconds, skipped=skipped)
        except Exception as error:  # noqa: BLE001 - a measurement of ours: the step is counted, its rows are lost
            self._ledger.own_error(error)
        self._aftermath.tend(self._ledger.recorder.num_sealed)
        self._faults.step_ended(reading, skipped=skipped)
        self._step_index += 1

    def _record(self, reading: Reading, seconds: float, *, skipped: bool) -> None:
        started = time.perf_counter()
        watch = self._watched.watch
        update = watch.update_norm(max(reading.num_backwards - 1, 0))
        rows = watch.take_rows()
        largest = watch.largest if rows is not None else ("", math.nan)
        self._run_up.add(self._step_index, reading, largest)
        self._ledger.cost(time.perf_counter() - started)
        self._ledger.end_step(
            self._step_index,
            reading,
            rows,
            seconds=seconds,
            learning_rates=[float(g["lr"]) for o in self._optimizers for g in o.param_groups if "lr" in g],
            loss_scale=self._ledger.loss_scale(self._scaler) if self._mode == "plain" else self._scale,
            update_norm=update,
            skipped=skipped or not reading.stepped,
        )

    def _error(self, diagnosis: Diagnosis, prefix: str = "") -> NonFiniteError:
        self._ledger.flush()
        path = self._aftermath.render()
        return NonFiniteError(prefix + wording.message(diagnosis, path), diagnosis, path)

    # What the watch calls.

    def _optimizer_arrived(self, optimizer: Optimizer) -> None:
        """One that was not named to `attach` is about to step; one that a replay makes for itself is only watched."""
        watch = self._watched.watch
        if self.replaying and optimizer not in self._optimizers:
            watch.follow(optimizer)
        elif optimizer not in self._optimizers:
            watch.unseen(partial(take_in, optimizer, self._newcomers, self._state, watch, self._history))
            self._ledger.event(wording.new_optimizer(optimizer))

    def _update_begins(self, _optimizer: Optimizer) -> None:
        if self._mode != "replayable":
            self._judge_unwrapped(before_update=True)

    def _update_ended(self, optimizer: Optimizer) -> None:
        if self._mode == "plain" and optimizer is self._optimizers[0]:
            self._finish(self._judge_unwrapped(before_update=False))
            self._begin_step()

    # Without a replayable step.

    def _judge_unwrapped(self, *, before_update: bool, returned: Any = None) -> Reading:
        """Judge what is known so far: before the update, where harm can still be kept off, and when the step ends.

        What is returned may be a metric of 0 / 0, and no replay can tell: a loss that is used shows in the gradients.
        """
        watched = self._watched
        reading = watched.read(returned)
        reading = replace(reading, bad_losses=[name for name in reading.bad_losses if name in watched.losses])
        if self._concluded or not is_doubtful(reading, watched.model, watched.watch):
            return reading
        self._concluded = True
        if self._faults.enough and self._policy != "raise":
            self._faults.conclude_briefly(reading)
        else:
            self._conclude_unwrapped(reading)
        if before_update and self._policy in ("skip", "rollback"):
            for parameter in watched.parameters.values():
                parameter.grad = None  # an optimizer passes over parameters without a gradient
        return reading

    def _conclude_unwrapped(self, reading: Reading) -> None:
        context = Context(proof="hooks", **self._faults.facts(self._step_index))
        diagnosis = by_hooks(symptoms(self._watched.watch, reading), context)
        diagnosis = of_one_rank(diagnosis) if spans_processes() else diagnosis
        self._faults.conclude(diagnosis, self._step_index)
        if self._policy == "raise":
            self._finish(reading, skipped=True)
            raise self._error(diagnosis)
