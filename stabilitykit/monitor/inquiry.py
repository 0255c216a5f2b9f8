"""From a suspicion to a diagnosis: rewind, run the step again under the tracer, walk back, conclude."""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from stabilitykit.containers import tensors_of
from stabilitykit.diagnose.conclude import Context, conclude
from stabilitykit.diagnose.graph import Leaf, Operation
from stabilitykit.diagnose.numbers import bad_numbers
from stabilitykit.diagnose.retrace import Lead, Subject, batch_name, retrace
from stabilitykit.diagnose.walk import Finding, find_origin
from stabilitykit.errors import UsageError
from stabilitykit.measure.values import is_finite
from stabilitykit.monitor.history import History, PastStep, Segment, Step
from stabilitykit.schema import Diagnosis
from stabilitykit.snapshot import Snapshot, TrainingState
from stabilitykit.watch.reading import Reading

# What is raised for no number's sake: a missing key, a wrong type, a file, the end of an iterator.
_UNRELATED = (
    AttributeError, EOFError, ImportError, KeyError, MemoryError, NameError, OSError, StopIteration, TypeError,
    torch.OutOfMemoryError,
)  # fmt: skip

_STEPS_BACK = (1, 8)  # are traced with a step that used what the script keeps: one is enough as a rule
MOST_RIVALS = 8  # origins that are weighed against each other, a replay each


def refuse_deferred(function: Callable[..., Any]) -> None:
    """Refuse what does not do a step when it is called.

    Raises:
        UsageError: it is no function, or a coroutine or a generator.
    """
    if not callable(function):
        raise UsageError(
            f"replayable: got a {type(function).__name__}, expected the function that does a step; do not call it yet"
        )
    called = function
    while isinstance(called, partial):
        called = called.func
    if any(map(_is_deferred, (called, type(called).__call__))):
        name = getattr(called, "__name__", type(called).__name__)
        raise UsageError(
            f"replayable: got {name}, a coroutine or generator, expected a function that has done its step when it "
            "returns; use `with monitor.step():` around the step instead"
        )


def _is_deferred(function: object) -> bool:
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    return any(kind(function) for kind in kinds)


@dataclass(frozen=True)
class Ran:
    """A step that has just run: the call, what the sentinel read, what it returned or raised."""

    function: Step
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reading: Reading
    returned: Any
    raised: Exception | None

    @property
    def may_be_numerical(self) -> bool:
        """Whether it raised what code may raise that met a NaN: a check's error, an assertion, a class of its own."""
        return self.raised is not None and not isinstance(self.raised, _UNRELATED)

    @property
    def is_doubtful(self) -> bool:
        """Whether it has to be looked into: something looks non-finite, or the step raised as if it were."""
        return self.reading.suspicious or self.may_be_numerical

    def outcome(self) -> Any:
        """Return or raise as the step did."""
        if self.raised is not None:
            try:
                raise self.raised
            finally:
                del self  # the error's traceback holds this frame, and a cycle would keep all that the step has made
        return self.returned


@dataclass(frozen=True)
class Outcome:
    """What an inquiry found, and the states to go on from.

    Attributes:
        diagnosis: None where the suspicion was unfounded: nothing bad reaches loss, gradients or parameters.
        before: the state at the start of the step; `after` where nobody will go back to it.
        after: the state as the first run of the step left it; None where it is as it was, since no copy could be made.
        failure: why the step could not be run again; `before` is then `after`.
        same: whether the second run gave bit for bit what the first had.
        exact: whether all on the way back to `before` had.
    """

    diagnosis: Diagnosis | None
    before: Snapshot | None
    after: Snapshot | None
    failure: Exception | None = None
    same: bool = True
    exact: bool = True


@dataclass(frozen=True)
class Inquiry:
    """Everything an inquiry needs of the monitor.

    Attributes:
        constants: copies of the module buffers that were non-finite when the monitor was attached.
        read: judges a re-run, given the step's number and what it returned.
        discard: lets go of what was measured in a re-run that was interfered with, given what it returned.
        begin: tells the watch that a step is about to be run again, and from where if that is held anyway.
        goes_back: whether the state before the step will be wanted.
        late_writes: parameters that someone wrote to before the current step, unnoticed, as the step has used them.
    """

    state: TrainingState
    history: History
    subject: Subject
    constants: Mapping[str, Tensor]
    begin: Callable[[Snapshot | None], None]
    read: Callable[[int, Any], Reading]
    discard: Callable[[Any], object]
    late_writes: Callable[[], Mapping[str, Tensor]]
    goes_back: bool

    def hold(self, ran: Ran, facts: Callable[[], Mapping[str, Any]], *, unused: bool = False) -> Outcome:
        """Look into the step that has just run.  The state is left anywhere: the caller restores one of the two.

        Args:
            ran: the step.
            facts: the monitor's part of the diagnosis' context.
            unused: bad gradients count although no optimizer stepped.
        """
        return self._from_here(lambda after: self._look(ran, facts, after, unused=unused))

    def _from_here(self, look: Callable[[Snapshot], Outcome]) -> Outcome:
        """What `look` gives, which runs steps again; where it is interrupted, the state is as the step left it."""
        try:
            after = self.state.capture()
        except Exception as error:  # noqa: BLE001 - no memory for a copy, say: training goes on
            return Outcome(None, None, None, error)
        try:
            return look(after)
        except Exception as error:  # noqa: BLE001 - ours or the step's, on its second run: training goes on
            return Outcome(None, after, after, error)
        except BaseException:  # Ctrl-C
            self.state.restore(after)
            raise

    def _look(self, ran: Ran, facts: Callable[[], Mapping[str, Any]], after: Snapshot, *, unused: bool) -> Outcome:
        intended = self._intended(self._unchanged_constants())
        current = self.history.recent()[-1]
        route = self.history.route()
        written = self.late_writes()
        exact = self._rewind(written)
        crowded = self.goes_back and not self.history.has_room and self.history.unrepeated is None
        before = self._begun(route[-1], written, over=crowded) if self.goes_back else after
        if crowded:
            route = (Segment(before, [current]),)  # a third copy of a large state is not held to look further back
        self.begin(before if self.goes_back else None)
        args, kwargs = current.inputs()
        retraced = retrace(self.subject, ran.function, args, kwargs, unused_gradients=unused)
        again = self.read(current.index, retraced.returned)
        finding = find_origin(retraced.trace.symptoms, intended)
        same = ran.reading.same_step(again)
        if finding is None and retraced.error is not None and ran.raised is None:
            return Outcome(None, after, after, retraced.error)
        if finding is None:
            return Outcome(None, before, after, same=same, exact=exact)
        known = dict(facts())
        with suppress(Exception):  # a step that is interfered with may raise; there is a finding already
            finding = self._weigh(ran, route[-1], written, finding, intended, unused=unused)
        with suppress(Exception):
            if (earlier := self._look_further_back(ran, route, finding, intended)) is not None:
                finding, step = earlier
                known |= {"step": step, "sample_ids": None, "noticed_in": current.index}
        context = Context(
            proof="replayed" if exact and same else "replayed-differs",
            batch_size=retraced.trace.batch_size,
            hyperparameters={**self._hyperparameters(), **retraced.settings},
            loss_was_finite=not any(entry.role in ("loss", "returned") for entry in retraced.trace.symptoms),
            optimizer=", ".join(type(entry).__name__ for entry in self.subject.optimizers),
            **known,
        )
        return Outcome(conclude(finding, context), before, after, same=same, exact=exact)

    def _weigh(
        self,
        ran: Ran,
        segment: Segment,
        written: Mapping[str, Tensor],
        finding: Finding,
        intended: Callable[[Leaf], bool],
        *,
        unused: bool,
    ) -> Finding:
        """The first of several origins that does harm when what the others made is finite: one may have been masked."""
        current = segment.steps[-1]
        for candidate in finding.rivals[:MOST_RIVALS]:
            others = {_index(rival) for rival in finding.rivals} - {_index(candidate)}
            self.history.repeat(segment, current, self._rerun)
            self._write(written)
            self.begin(None)
            args, kwargs = current.inputs()
            retraced = retrace(self.subject, ran.function, args, kwargs, unused_gradients=unused, mended=others)
            self.discard(retraced.returned)
            found = find_origin(retraced.trace.symptoms, intended)
            if found is not None and _index(found) == _index(candidate):
                return candidate
        return finding

    def _look_further_back(
        self, ran: Ran, route: Sequence[Segment], finding: Finding, intended: Callable[[Leaf], bool]
    ) -> tuple[Finding, int] | None:
        """The origin in an earlier step, and which, where that made what the script kept and this one has used."""
        if not self._is_kept(finding):
            return None
        depths = sorted({min(depth, sum(len(segment.steps) for segment in route) - 1) for depth in _STEPS_BACK})
        found = (self._trace_from(depth, ran, route, intended) for depth in depths if depth > 0)
        return next((entry for entry in found if entry is not None), None)

    def _trace_from(
        self, depth: int, ran: Ran, route: Sequence[Segment], intended: Callable[[Leaf], bool]
    ) -> tuple[Finding, int] | None:
        steps = [(segment, past) for segment in route for past in segment.steps][-depth - 1 :]
        *leads, current = (past for _, past in steps)
        self.history.repeat(steps[0][0], leads[0], self._rerun)
        self.begin(None)
        args, kwargs = current.inputs()
        leading = [self._lead(past, following) for past, following in pairwise((*leads, current))]
        retraced = retrace(self.subject, ran.function, args, kwargs, leads=leading)
        if not retraced.begins or not ran.reading.same_step(self.read(current.index, retraced.returned)):
            return None
        found = find_origin(retraced.trace.symptoms, intended)
        made = found.origin if found is not None else None
        if found is None or not isinstance(made, Operation) or made.index > retraced.begins[-1]:
            return None
        return found, leads[bisect_left(retraced.begins[1:], made.index)].index

    def _lead(self, past: PastStep, following: PastStep) -> Lead:
        def settle(returned: Any) -> bool:
            again = self.read(past.index, returned)
            self.history.set_out(following)
            self.begin(None)
            return past.reading is not None and past.reading.same_step(again)

        return Lead(past.function, *past.inputs(), settle)

    def _is_kept(self, finding: Finding) -> bool:
        """Whether it came by a tensor that the script keeps: a statistic, the weights of a teacher beside the model.

        What is loaded, a checkpoint, counts from where it is.
        """
        origin, first = finding.origin, finding.path[0] if finding.path else None
        if isinstance(origin, Leaf) and first is not None and (first.loads or first.phase == "optimizer"):
            return False
        foreign = (leaf for leaf in finding.leaves() if leaf.name not in self.subject.parameters)
        return any(leaf.kind in ("unknown", "parameter") for leaf in foreign)

    def undo(self) -> Outcome:
        """Go back to the start of the step that has just run, without a trace."""

        def go_back(after: Snapshot) -> Outcome:
            exact = self._rewind(self.late_writes())
            return Outcome(None, self.state.capture(), after, exact=exact)

        return self._from_here(go_back)

    def _rewind(self, written: Mapping[str, Tensor]) -> bool:
        """Put the state where the step began; whether all on the way was as it had been."""
        exact = self.history.rewind(self._rerun)
        self._write(written)
        return exact

    def _begun(self, segment: Segment, written: Mapping[str, Tensor], *, over: bool) -> Snapshot:
        """The state in which the current step begins, which the rewind has put back; no copy where there is one.

        Args:
            segment: by which it was put back.
            written: what had to be written to besides.
            over: the segment's snapshot may be written over.
        """
        if len(segment.steps) == 1 and not written:
            return segment.snapshot
        return self.state.capture(self.history.unless_good(segment.snapshot) if over else None)

    def _write(self, written: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, held in written.items():
                self.subject.parameters[name].copy_(held)

    def _rerun(self, past: PastStep) -> Reading:
        self.begin(None)
        args, kwargs = past.inputs()
        returned = past.function(*args, **kwargs)
        return self.read(past.index, returned)

    def _intended(self, constants: set[str]) -> Callable[[Leaf], bool]:
        """Whether a leaf is non-finite on purpose: a mask of Inf alone, or a marker earlier batches had."""
        seen_before = self._markers()

        def intended(leaf: Leaf) -> bool:
            if leaf.kind == "batch":
                return (leaf.name, bool(leaf.summary.nan)) in seen_before
            if leaf.kind == "module_buffer":
                return leaf.summary.nan == 0 and leaf.name in constants
            return leaf.kind == "unknown" and leaf.summary.nan == 0

        return intended

    def _unchanged_constants(self) -> set[str]:
        """Module buffers non-finite from the start that still hold what they held: a mask, not a running minimum."""
        live = dict(self.subject.model.named_buffers())
        return {
            name
            for name, held in self.constants.items()
            if name in live and torch.equal(torch.nan_to_num(live[name]), torch.nan_to_num(held))
        }

    def _markers(self) -> set[tuple[str, bool]]:
        """Entries of earlier batches that were non-finite and did no harm: their names, and whether they held NaN.

        A tensor that is there in every step, a data set, may not have been used before: a NaN in it is no marker.
        """
        *earlier, current = (past.inputs() for past in self.history.recent())
        lasting = {id(tensor) for _, tensor in tensors_of(current)}
        tensors = [
            (path, tensor, bool(tensor.isnan().any()))
            for batch in earlier
            for path, tensor in tensors_of(batch)
            if tensor.is_floating_point() and not is_finite(tensor)
        ]
        numbers = [(path, bool(tensor.isnan().any())) for batch in earlier for path, tensor in bad_numbers(batch)]
        met = [(path, nan) for path, tensor, nan in tensors if not (nan and id(tensor) in lasting)]
        return {(batch_name(path), nan) for path, nan in (*met, *numbers)}

    def _hyperparameters(self) -> Mapping[str, Mapping[str, Any]]:
        names = {id(parameter): name for name, parameter in self.subject.parameters.items()}
        return {
            names[id(parameter)]: {key: value for key, value in group.items() if key != "params"}
            for optimizer in self.subject.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in names
        }


def _index(finding: Finding) -> int:
    """When the origin ran; -1 for what was bad before any operation."""
    return finding.origin.index
