"""attach() and the Monitor: where watching, recording and diagnosing meet, and all that a script calls."""

from __future__ import annotations

import functools
import math
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, ParamSpec, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabilitykit.aftermath import Aftermath, new_run_dir
from stabilitykit.config import ON_NONFINITE, MonitorConfig
from stabilitykit.diagnose.retrace import Subject
from stabilitykit.errors import NonFiniteError, UsageError
from stabilitykit.history import History
from stabilitykit.inquiry import Inquiry, Outcome, run_up_step
from stabilitykit.ledger import Ledger
from stabilitykit.measure.values import is_finite
from stabilitykit.schema import Diagnosis, Event, RunUpStep
from stabilitykit.snapshot import RandomStates, TrainingState, tensors_of
from stabilitykit.watch.modules import ModuleWatch
from stabilitykit.watch.parameters import ParameterWatch
from stabilitykit.watch.rows import RowCollector
from stabilitykit.watch.sentinel import Reading, Sentinel

P = ParamSpec("P")
R = TypeVar("R")
OnNonFinite = Literal["raise", "skip", "rollback", "record"]


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    run_dir: str | Path | None = None,
    *,
    config: MonitorConfig | str | None = None,
    on_nonfinite: OnNonFinite = "raise",
    scaler: Any = None,
    stateful: Sequence[object] = (),
    replay_buffer: object | None = None,
) -> Monitor:
    """Watch a training run from here on.

    Args:
        model: the network; hooks go onto it and come off at `close`.
        optimizer: one, or a sequence of them.
        run_dir: the run folder, made if need be; default `runs/<time>`.
        config: a MonitorConfig or the name of a preset: light, default, full.
        on_nonfinite: `raise` NonFiniteError with the verdict; `skip`: undo the step and go on; `rollback`: back to
            the last
            good snapshot and go on; `record`: diagnose and leave training exactly as it would have been.
        scaler: a GradScaler, put back with the rest when a step is replayed.
        stateful: further objects that a step changes, with `state_dict` and `load_state_dict`; also generators,
            tensors.
        replay_buffer: an object or mapping with tensors `examples, labels, logits`, audited and put back on replay.

    Returns:
        The Monitor; also a context manager that closes itself.

    Raises:
        UsageError: an argument that cannot be right.
        RunFolderError: the run folder holds another run, or cannot be written.
    """
    if on_nonfinite not in ON_NONFINITE:
        raise UsageError(f"attach: got on_nonfinite={on_nonfinite!r}, expected one of {', '.join(ON_NONFINITE)}")
    if not isinstance(model, nn.Module):
        raise UsageError(f"attach: got a {type(model).__name__} as model, expected a torch.nn.Module")
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer or ())
    if wrong := [type(entry).__name__ for entry in optimizers if not isinstance(entry, Optimizer)]:
        raise UsageError(f"attach: got {wrong[0]} as optimizer, expected a torch.optim.Optimizer or a sequence of them")
    folder = Path(run_dir) if run_dir is not None else new_run_dir()
    return Monitor(
        model,
        optimizers,
        folder,
        config=MonitorConfig.of(config),
        on_nonfinite=on_nonfinite,
        scaler=scaler,
        stateful=stateful,
        replay_buffer=replay_buffer,
    )


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
        self._model, self._optimizers, self._scaler = model, tuple(optimizers), scaler
        self._parameters = _named_parameters(model, optimizers)
        extras = [entry for entry in (*stateful, scaler, replay_buffer) if entry is not None]
        self._state = TrainingState(model, optimizers, extras)
        self._ledger = Ledger(run_dir, model, config, replay_buffer)
        self._aftermath = Aftermath(run_dir, config)
        self._history = self._new_history()
        rows = RowCollector(self._ledger.recorder)
        self._sentinel = Sentinel(
            model,
            optimizers,
            self._parameters,
            unseen=self._unseen,
            on_backward=self._backward_ended,
            on_optimizer=self._optimizer_starts,
            after_optimizer=self._optimizer_ended,
        )
        self._modules = ModuleWatch(model, rows, self._unseen)
        self._tensors = ParameterWatch(model, optimizers, self._parameters, rows, config)
        self._rows = rows
        self._subject = Subject(model, optimizers, self._parameters, replay_buffer)
        self._constants = {n: b.detach().clone() for n, b in model.named_buffers() if not is_finite(b)}
        self._run_up: deque[RunUpStep] = deque(maxlen=config.run_up or None)
        self._diagnosis: Diagnosis | None = None
        self._step_index = 0
        self._mode: Literal["plain", "block", "replayable"] = "plain"
        self._inside = self._closed = False
        self._losses: dict[str, Tensor | float] = {}
        self._acquitted: set[str] = set()
        self._num_faults = self._num_consecutive = 0
        self._started = time.perf_counter()
        self._finalizer = weakref.finalize(self, _abandoned, self._ledger, self._aftermath)

    # What a training script calls.

    def replayable(self, function: Callable[P, R]) -> Callable[P, R]:
        """Wrap a training step so that a failing one can be put back and run again; one call is one step.

        The function gets its batch as arguments and does zero_grad, forward, backward and the optimizer's step; what it
        returns is handed on (`skip` and `rollback` give None). Return the loss: it is checked as well.
        """
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
        self._mode = "block" if self._mode == "plain" else self._mode
        self._begin_step()
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        reading = self._sentinel.read(self._losses)
        self._finish(reading)

    def log(self, *, task: int | None = None, epoch: int | None = None, **scalars: float | Tensor) -> None:
        """Record numbers of your own with the current step; `task` and `epoch` hold until they are set again."""
        if not self.replaying and not self._closed:
            self._ledger.log(task=task, epoch=epoch, scalars=scalars)

    def log_loss(self, **terms: float | Tensor) -> None:
        """Record the terms of the loss by name: each is checked, and a fault names the term it came through."""
        for name, value in terms.items():
            self._losses[name] = value.detach() if isinstance(value, Tensor) else float(value)

    def log_samples(self, indices: Sequence[int] | Tensor) -> None:
        """Say which samples of the data set the rows of this step's batch are, so that a diagnosis can name them."""
        self._ledger.samples = indices.tolist() if isinstance(indices, Tensor) else list(indices)

    def log_event(self, kind: str, message: str, **data: Any) -> None:
        """Record something that happened: a guard that acted, a change of task."""
        if not self.replaying and not self._closed:
            severity = data.pop("severity", "info")
            subject = str(data.pop("subject", ""))
            self._ledger.event(Event(kind=kind, message=message, severity=severity, subject=subject, data=data))

    def note(self, **facts: Any) -> None:
        """Add facts to `run.json`: results, settings; anything JSON can hold."""
        self._ledger.run_file.update(facts)

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
        return self.run_dir / "report.html"

    def close(self, error: BaseException | None = None) -> None:
        """Take all hooks off, seal the record, write the parquet parts and the report.  Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._finalizer.detach()
        self._sentinel.close()
        self._modules.close()
        self._history.forget()
        self._ledger.close(self._step_index - 1, error)
        self._aftermath.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    # A step.

    def _begin_step(self) -> None:
        self._losses.clear()
        self._sentinel.begin()
        recording = self._ledger.begin_step(self._step_index)
        self._modules.begin(recording=recording)
        self._tensors.begin()
        self._started = time.perf_counter()

    def _replayable_step(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entered = time.perf_counter()
        self._history.begin(self._step_index, args, kwargs)
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
        reading = self._read(returned)
        if raised is not None or reading.suspicious:
            return self._suspect(function, args, kwargs, reading, returned, raised)
        if reading.unused_gradients:
            self._ledger.event(_unused(reading, scaled=self._scaler is not None))
        self._history.end(reading, seconds)
        self._finish(reading, seconds)
        return returned

    def _read(self, returned: Any) -> Reading:
        losses: dict[str, Tensor | float] = {}
        if isinstance(returned, float):
            losses["loss"] = returned
        for path, tensor in tensors_of(returned):
            if tensor.numel() == 1 and tensor.is_floating_point() and path not in self._acquitted:
                losses[f"loss{path}"] = tensor.detach().reshape(())
        return self._sentinel.read(losses | self._losses)

    def _finish(self, reading: Reading, seconds: float | None = None, *, skipped: bool = False) -> None:
        """Write the step's rows and go on to the next number."""
        started = time.perf_counter()
        update = self._tensors.step_ended(reading.num_backwards) if self._modules.recording else math.nan
        self._modules.recording = False
        rows = self._rows.take()
        self._run_up.append(run_up_step(self._step_index, reading))
        self._ledger.end_step(
            self._step_index,
            reading,
            rows,
            seconds=started - self._started if seconds is None else seconds,
            learning_rates=[float(g["lr"]) for o in self._optimizers for g in o.param_groups if "lr" in g],
            loss_scale=float(self._scaler.get_scale()) if self._scaler is not None else math.nan,
            update_norm=update,
            skipped=skipped or not reading.stepped,
        )
        self._ledger.cost(time.perf_counter() - started)
        if not skipped:
            self._num_consecutive = 0
        self._step_index += 1

    # A suspicion.

    def _suspect(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reading: Reading,
        returned: Any,
        raised: Exception | None,
    ) -> Any:
        """Something looks non-finite, or the step raised: find out, then do what `on_nonfinite` says."""
        if raised is not None and not (
            reading.suspicious or isinstance(raised, ArithmeticError | AssertionError | ValueError | RuntimeError)
        ):
            raise raised
        outcome = self._inquire(function, args, kwargs, reading)
        if outcome.diagnosis is None:
            self._state.restore(outcome.after)
            self._history.forget()
            if raised is not None:
                raise raised
            self._acquit(reading, returned)
            self._finish(reading)
            return returned
        self._conclude(outcome.diagnosis)
        return self._act(outcome, reading, returned, raised)

    def _inquire(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], reading: Reading
    ) -> Outcome:
        inquiry = Inquiry(
            state=self._state,
            history=self._history,
            subject=self._subject,
            constants=self._constants,
            begin=self._begin_again,
            read=self._read,
        )
        self.replaying = True
        rows = self._rows.take()
        self._modules.recording = False
        try:
            return inquiry.hold(function, args, kwargs, reading, self._facts)
        finally:
            self.replaying = False
            self._ledger.keep(rows)

    def _begin_again(self) -> None:
        self._losses.clear()
        self._sentinel.begin()

    def _facts(self) -> Mapping[str, Any]:
        return {
            "step": self._step_index,
            "task": self._ledger.task,
            "sample_ids": self._ledger.samples,
            "run_up": tuple(self._run_up),
        }

    def _acquit(self, reading: Reading, returned: Any) -> None:
        """What looked bad does no harm: do not look into it again."""
        self._sentinel.accept_bad_buffers(reading.bad_buffers)
        self._acquitted.update(
            path
            for path, tensor in tensors_of(returned)
            if tensor.numel() == 1 and not tensor.requires_grad and not is_finite(tensor)
        )

    def _conclude(self, diagnosis: Diagnosis) -> None:
        self._num_faults += 1
        self._diagnosis = self._diagnosis or diagnosis
        self._ledger.fault(self._step_index, diagnosis, self._num_faults)

    def _act(self, outcome: Outcome, reading: Reading, returned: Any, raised: Exception | None) -> Any:
        assert outcome.diagnosis is not None
        self._history.forget()
        if self._policy == "record":
            self._state.restore(outcome.after)
            self._finish(reading)
            if raised is not None:
                raise raised
            return returned
        if self._policy == "raise":
            self._state.restore(outcome.before)
            self._finish(reading, skipped=True)
            raise self._error(outcome.diagnosis) from raised
        streams = RandomStates.capture()
        self._state.restore(outcome.before)
        if self._policy == "rollback":
            back_to = self._history.roll_back()
            self._ledger.event(_rolled_back(self._step_index, back_to))
        streams.restore()  # else the same random draws would meet the same fate
        self._num_consecutive += 1
        self._finish(reading, skipped=True)
        if self._num_consecutive >= self._config.max_consecutive_skips:
            raise self._error(outcome.diagnosis, f"{self._num_consecutive} steps in a row were undone; ")
        return None

    def _error(self, diagnosis: Diagnosis, prefix: str = "") -> NonFiniteError:
        self._ledger.flush()
        path = self._aftermath.render()
        return NonFiniteError(prefix + message(diagnosis, path), diagnosis, path)

    # What the sentinel calls.

    def _unseen(self, measure: Callable[[], None]) -> None:
        """Run a measurement of ours: not traced, never raising into training."""
        try:
            with torch.no_grad(), _without_modes():
                measure()
        except Exception as error:  # noqa: BLE001 - counted, said once, shown in the report
            self._ledger.own_error(error)

    def _backward_ended(self) -> None:
        if self._modules.recording:
            self._tensors.backward_ended(0)

    def _optimizer_starts(self, _optimizer: Optimizer) -> None:
        if self._modules.recording:
            self._tensors.optimizer_starts(0)

    def _optimizer_ended(self, optimizer: Optimizer) -> None:
        """Plain attachment: the first optimizer's step ends the step."""
        if self._mode == "plain" and optimizer is self._optimizers[0] and not self._inside:
            self._finish(self._sentinel.read(self._losses))
            self._begin_step()

    def _new_history(self) -> History:
        config = self._config
        return History(
            self._state,
            every=config.snapshot_every,
            budget=config.snapshot_budget,
            max_bytes=config.history_bytes,
            rollback_steps=config.rollback_steps,
        )


@contextmanager
def _without_modes() -> Iterator[None]:
    """Dispatch modes off: a tracer does not see what the observers do."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        yield


def message(diagnosis: Diagnosis, report: str) -> str:
    """The text of NonFiniteError: the verdict and what to do about it."""
    origin = diagnosis.origin
    lines = [diagnosis.verdict]
    lines += [f"  {origin.code}"] if origin.code else []
    lines += [f"  given {entry.describe()}" for entry in diagnosis.inputs[:4]]
    lines += [f"noticed in {diagnosis.noticed}; {_PROOF[origin.proof]}"] if diagnosis.noticed else []
    if origin.samples:
        shown = ", ".join(map(str, origin.samples[:8])) + (", ..." if len(origin.samples) > 8 else "")
        lines.append(f"{diagnosis.samples_are}: {shown}")
    lines += [f"cause: {diagnosis.cause}"] if diagnosis.cause else []
    lines += [f"try: {remedy}" for remedy in diagnosis.remedies[:3]]
    lines += [f"report: {report}"] if report else []
    return "\n".join(lines)


_PROOF: Mapping[str, str] = {
    "replayed": "proved by a bit-identical replay of the step",
    "replayed-differs": "from a replay that was not bit-identical: the step reads something that was not put back",
    "hooks": "known from module hooks",
    "record": "known from the record",
}


def _named_parameters(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(model.named_parameters())
    known = {id(entry) for entry in named.values()}
    for which, optimizer in enumerate(optimizers):
        for group_index, group in enumerate(optimizer.param_groups):
            for position, entry in enumerate(group["params"]):
                if id(entry) not in known:
                    named[f"optimizer{which or ''}.group{group_index}[{position}]"] = entry
                    known.add(id(entry))
    return named


def _unused(reading: Reading, *, scaled: bool) -> Event:
    names = ", ".join(reading.bad_gradients[:3])
    return Event(
        kind="scaler_skip" if scaled else "unused_gradients",
        message=f"gradients of {names} are not finite and no optimizer stepped: a step skipped by design, no fault",
        severity="info",
        subject=reading.bad_gradients[0],
        data={"num_gradients": len(reading.bad_gradients)},
    )


def _rolled_back(step: int, back_to: int | None) -> Event:
    text = (
        f"back to the state at the start of step {back_to:,}" if back_to is not None else "no snapshot yet: step undone"
    )
    return Event(kind="rollback", message=text, severity="warning", data={"from_step": step, "to_step": back_to})


def _abandoned(ledger: Ledger, aftermath: Aftermath) -> None:
    """The monitor was never closed: it was dropped, or the interpreter ends."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ledger.abandon()
        aftermath.finish()
