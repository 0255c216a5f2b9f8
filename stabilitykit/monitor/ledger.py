"""The monitor's bookkeeping: step rows, events, the recording cadence: all that goes to the recorder."""

from __future__ import annotations

import math
import os
import sys
import time
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from stabilitykit.config import CADENCES, MonitorConfig
from stabilitykit.monitor.cadence import Cadence
from stabilitykit.monitor.runfile import RunFile
from stabilitykit.record import Recorder
from stabilitykit.record.ending import write_ending
from stabilitykit.record.folder import last_diagnosis, replace_file
from stabilitykit.schema import SCALAR_ROW, STEP_ROW, Diagnosis, Ending, Event
from stabilitykit.watch.buffer import Audit, full_audit, preprocessing
from stabilitykit.watch.reading import Reading

Rows = np.ndarray[Any, np.dtype[np.void]]


class Ledger:
    """Gathers what belongs to a step and writes it in one go.

    Attributes:
        recorder: hands out tensor ids.
        run_file: the run's facts.
        task: the caller's task number, None without tasks.
        samples: data-set indices of the current batch's rows, None where the caller does not say.
    """

    def __init__(self, run_dir: Path, model: nn.Module, config: MonitorConfig, replay_buffer: object | None) -> None:
        self.run_file = RunFile.open(run_dir, model, config)
        self.recorder = Recorder(run_dir, attempt=self.run_file.attempt)
        self.task: int | None = None
        self.samples: Sequence[int] | None = None
        self._run_dir, self._config, self._buffer = run_dir, config, replay_buffer
        self._teacher: weakref.ref[nn.Module] | None = weakref.ref(model)  # whose hooks hold the monitor
        self._epoch: int | None = None
        self._scalars: dict[str, float | Tensor] = {}
        self._events: list[Event] = []
        self._kept: Rows | None = None
        self._recorded: deque[int] = deque(maxlen=2 * CADENCES[-1])
        self._loss_terms: list[str] = []
        self._pid = os.getpid()
        self._last_step = -1
        self._num_own_errors = 0
        self._num_diagnoses = last_diagnosis(run_dir)
        self._cadence = Cadence(config.cadence, config.budget)
        self._known_findings: set[tuple[str, str]] = set()

    # During a step.

    def begin_step(self, step: int) -> bool:
        """A step starts; whether its tensors are to be recorded."""
        self.samples = None
        return self._cadence.begin(step)

    @property
    def cadence(self) -> int:
        """Tensors are recorded every so many steps."""
        return self._cadence.every

    def cost(self, seconds: float) -> None:
        """Watching this step has taken so much more."""
        self._cadence.spent += seconds

    def log(self, *, task: int | None, epoch: int | None, scalars: Mapping[str, float | Tensor]) -> None:
        """Numbers of the caller's, written with the next step row."""
        told = {name: int(value) for name, value in self.numbers("log", _given(task=task, epoch=epoch)).items()}
        if told.get("task", self.task) != self.task:
            self.task = told["task"]
            self.event(Event(kind="task", message=f"task {self.task} begins", data={"task": self.task}))
        self._epoch = told.get("epoch", self._epoch)
        self._scalars |= self.numbers("log", scalars)

    def numbers(self, where: str, given: Mapping[str, Any]) -> dict[str, float | Tensor]:
        """The caller's numbers, tensors yet to be brought over; what is none is left out, and said once."""
        numbers: dict[str, float | Tensor] = {}
        for name, value in given.items():
            try:
                one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
                numbers[name] = value.detach().reshape(()) if one else float(value)
            except (TypeError, ValueError, RuntimeError):
                self._left_out(where, name, value)
        return numbers

    def _left_out(self, where: str, name: str, value: object) -> None:
        got = f"{value!r:.60}"
        if isinstance(value, Tensor):
            kind = "complex " if value.is_complex() else "meta " if value.is_meta else ""
            got = f"a {kind}tensor of shape {tuple(value.shape)}"
        self.own_error(TypeError(f"{where}: got {got} as {name}, expected a number; it is left out"))

    def loss_scale(self, scaler: Any) -> float:
        """The scale of a GradScaler as it is now, nan without one."""
        if scaler is None:
            return math.nan
        try:
            return float(scaler.get_scale())
        except Exception as error:  # noqa: BLE001 - the caller's object
            self.own_error(error)
            return math.nan

    def event(self, event: Event) -> None:
        """Something that happened, written with the next step row."""
        self._events.append(_stamped(event))

    def own_error(self, error: BaseException) -> None:
        """One of our measurements failed: training goes on, one warning, and the report says so."""
        self._num_own_errors += 1
        if self._num_own_errors > 1:
            return
        text = "".join(traceback.format_exception_only(error)).strip()
        warnings.warn(f"stabilitykit: a measurement failed and is left out: {text}", RuntimeWarning, stacklevel=2)
        where = traceback.format_tb(error.__traceback__)[-1] if error.__traceback__ else ""
        self.event(Event(kind="own_error", severity="warning", message=text, data={"where": where}))

    def keep_dense(self, step: int, rows: Mapping[int, Rows | None]) -> None:
        """Rows of steps that were run again: new ones go to the log, the current step's wait for its end."""
        self._kept = rows.get(step)
        for earlier in sorted(set(rows) - {step} - set(self._recorded)):
            self.recorder.write(earlier, tensors=rows[earlier])
            self._recorded.append(earlier)

    def end_step(
        self,
        step: int,
        reading: Reading,
        tensors: Rows | None,
        *,
        seconds: float,
        learning_rates: Sequence[float],
        loss_scale: float,
        update_norm: float,
        skipped: bool,
    ) -> None:
        """Write all that belongs to the step; never raises."""
        self._last_step = step
        buffer = self._audit(step)
        kept, self._kept = self._kept, None
        row = np.zeros(1, STEP_ROW)
        scale = 1.0 if math.isnan(loss_scale) or loss_scale == 0 else loss_scale
        grad_norm, clipped = reading.grad_norm / scale, reading.grad_norm_clipped
        if clipped == reading.grad_norm:  # nobody has touched them: a fused optimizer takes them as they are, scaled
            clipped = grad_norm
        row[0] = (
            max(reading.num_backwards - 1, 0),
            -1 if self.task is None else self.task,
            -1 if self._epoch is None else self._epoch,
            time.time(),
            seconds,
            next(iter(reading.losses.values()), math.nan),
            grad_norm,
            clipped,
            _ratio(clipped, grad_norm),
            learning_rates[0] if learning_rates else math.nan,
            reading.parameter_norm,
            update_norm,
            loss_scale,
            skipped,
            self.cadence,
            self._cadence.spent,
        )
        scalars = self._scalar_rows(reading, learning_rates)
        events, self._events = self._events, []
        rows = tensors if kept is None else kept
        if rows is not None:
            self._recorded.append(step)
        self.recorder.write(step, steps=row, tensors=rows, scalars=scalars, buffer=buffer, events=events)
        self._cadence.end(seconds, next(iter(reading.losses.values()), math.nan), reading.grad_norm)

    def fault(self, step: int, diagnosis: Diagnosis) -> None:
        """Write `diagnosis.json` (later ones, of later attempts too, are numbered) and an event, before any raise."""
        self._num_diagnoses += 1
        number = self._num_diagnoses
        name = "diagnosis.json" if number == 1 else f"diagnosis-{number:04d}.json"
        self.event(
            Event(
                kind="nonfinite",
                severity="error",
                subject=diagnosis.origin.tensor or diagnosis.origin.module,
                message=diagnosis.verdict,
                data={"diagnosis": name, "rule": diagnosis.rule},
            )
        )
        try:
            replace_file(self._run_dir, self._run_dir / name, diagnosis.to_json().encode())
        except OSError as error:
            warnings.warn(f"stabilitykit: {name} could not be written: {error}", RuntimeWarning, stacklevel=2)

    def flush(self) -> None:
        """Write what waits for the next step row."""
        if self._events:
            events, self._events = self._events, []
            self.recorder.write(max(self._last_step, 0), events=events)

    def close(self, last_step: int, error: BaseException | None) -> None:
        """Seal the log and say how the run ended."""
        if os.getpid() != self._pid:
            return
        self._buffer = self._teacher = None
        self.flush()
        self.run_file.update({"loss_terms": self._loss_terms})
        self.recorder.close()
        text = "" if error is None else "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
        ending: Ending = "completed" if error is None else "raised"
        write_ending(self._run_dir, ending, last_step, text, attempt=self.run_file.attempt)

    def abandon(self) -> None:
        """As `close`, for a monitor that nobody closed: the interpreter's last error says how the run ended."""
        self.close(self._last_step, getattr(sys, "last_value", None))

    # Rows.

    def _scalar_rows(self, reading: Reading, learning_rates: Sequence[float]) -> Rows | None:
        names = list(reading.losses)
        terms = {f"loss/{name}": value for name, value in reading.losses.items() if name in names[1:] or name != "loss"}
        self._loss_terms += [name for name in terms if name not in self._loss_terms]
        rates = {f"lr/{group}": rate for group, rate in enumerate(learning_rates) if group > 0}
        values = terms | rates | self._take_scalars()
        if not values:
            return None
        rows = np.zeros(len(values), SCALAR_ROW)
        micro = max(reading.num_backwards - 1, 0)
        for position, (name, value) in enumerate(values.items()):
            rows[position] = (micro, self.recorder.scalar_id(name), value)
        return rows

    def _take_scalars(self) -> dict[str, float]:
        """The caller's numbers, brought over: one that cannot be is lost alone, and not met again."""
        given, self._scalars = self._scalars, {}
        taken: dict[str, float] = {}
        for name, value in given.items():
            try:
                taken[name] = float(value)
            except (TypeError, ValueError, RuntimeError):
                self._left_out("log", name, value)
        return taken

    def _audit(self, step: int) -> Rows | None:
        every = self._config.audit_every
        if self._buffer is None or not every or step % every:
            return None
        try:
            audit = self._full_audit(self._buffer)
        except Exception as error:  # noqa: BLE001 - the caller's object; training goes on
            self.own_error(error)
            return None
        for finding in audit.findings:
            # Logits that the network has outgrown are a number to follow, and no warning: it is being trained.
            if finding.kind != "teacher" and (finding.kind, finding.field) not in self._known_findings:
                self._known_findings.add((finding.kind, finding.field))
                data = {"slots": list(finding.slots[:100])}
                self.event(
                    Event(kind="buffer", severity="warning", subject=finding.field, message=finding.message, data=data)
                )
        return audit.row

    def _full_audit(self, buffer: object) -> Audit:
        """The audit, with the drift from stored logits where the buffer says how its examples become inputs."""
        preprocess = preprocessing(buffer)
        teacher = None if self._teacher is None else self._teacher()
        if preprocess is not None and teacher is not None:
            try:
                return full_audit(buffer, teacher, preprocess=preprocess)
            except Exception as error:  # noqa: BLE001 - the caller's model and function; the rest can be audited
                self._teacher = None
                self.own_error(error)
        return full_audit(buffer)


def _stamped(event: Event) -> Event:
    if event.wall_time:
        return event
    return Event(
        kind=event.kind,
        message=event.message,
        severity=event.severity,
        subject=event.subject,
        wall_time=time.time(),
        data=event.data,
    )


def _given(**numbers: int | None) -> dict[str, int]:
    return {name: number for name, number in numbers.items() if number is not None}


def _ratio(clipped: float, norm: float) -> float:
    return clipped / norm if norm and math.isfinite(norm) else math.nan
