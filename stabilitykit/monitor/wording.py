"""What the monitor says: the text of NonFiniteError, and its events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

from stabilitykit.schema import Diagnosis, Event
from stabilitykit.watch.reading import Reading

COMPILED = Event(
    kind="compiled",
    subject="modules",
    message=(
        "a module is compiled: no output is recorded of what lies inside, where hooks would cut the graph; gradients "
        "and parameters are, and a fault is replayed eagerly"
    ),
)
DISTRIBUTED = Event(
    kind="distributed",
    subject="replay",
    message=(
        "one of several processes: no step is run again, a fault is known from module hooks, and each rank judges for "
        "itself"
    ),
)


def message(diagnosis: Diagnosis, report: str) -> str:
    """The text of NonFiniteError: the verdict and what to do about it."""
    origin = diagnosis.origin
    lines = [diagnosis.verdict]
    lines += [f"  {origin.code}"] if origin.code else []
    lines += [f"  given {entry.describe()}" for entry in diagnosis.inputs[:4]]
    lines += [f"noticed in {diagnosis.noticed}; {PROOF[origin.proof]}"] if diagnosis.noticed else []
    if origin.samples:
        shown = ", ".join(map(str, origin.samples[:8])) + (", ..." if len(origin.samples) > 8 else "")
        lines.append(f"{diagnosis.samples_are}: {shown}")
    lines += [f"cause: {diagnosis.cause}"] if diagnosis.cause else []
    lines += [f"try: {remedy}" for remedy in diagnosis.remedies[:3]]
    lines += [f"report: {report}"] if report else []
    return "\n".join(lines)


PROOF: Mapping[str, str] = {
    "replayed": "proved by a bit-identical replay of the step",
    "replayed-differs": "from a replay that was not bit-identical: the step reads something that was not put back",
    "hooks": "known from module hooks",
    "record": "known from the record",
}


def told(kind: str, message: str, *, severity: Any = "info", subject: object = "", **data: Any) -> Event:
    """An event of the caller's."""
    known: Any = severity if severity in ("info", "warning", "error") else "info"
    return Event(kind=str(kind), message=str(message), severity=known, subject=str(subject), data=data)


def not_noted(reason: str) -> str:
    """The warning about facts that could not be written."""
    return f"stabilitykit: run.json could not be written ({reason}); it is tried again when the run is closed"


def new_optimizer(optimizer: Optimizer) -> Event:
    """An optimizer that was not named to `attach` steps parameters of the model."""
    name = type(optimizer).__name__
    return Event(kind="optimizer", subject=name, message=f"a new {name} steps parameters of the model from here on")


def later_fault(reading: Reading) -> Event:
    """A fault after those that are replayed in full."""
    bad = (*reading.bad_losses, *reading.bad_gradients, *reading.bad_parameters, *reading.bad_buffers)
    names = ", ".join(bad[:3])
    return Event(
        kind="nonfinite", severity="error", subject=bad[0] if bad else "", message=f"not finite again: {names}"
    )


def unused_gradients(reading: Reading, *, scaled: bool) -> Event:
    """Bad gradients that no optimizer used."""
    names = ", ".join(reading.bad_gradients[:3])
    return Event(
        kind="scaler_skip" if scaled else "unused_gradients",
        message=f"gradients of {names} are not finite and no optimizer stepped: a step skipped by design, no fault",
        severity="info",
        subject=reading.bad_gradients[0],
        data={"num_gradients": len(reading.bad_gradients)},
    )


def mended_gradients(reading: Reading) -> Event:
    """Bad gradients that the caller's code made finite before the update."""
    names = ", ".join(reading.bad_gradients[:3])
    text = f"gradients of {names} were not finite after backward and were when the optimizer started: mended on the way"
    return Event(kind="mended_gradients", severity="warning", subject=reading.bad_gradients[0], message=text)


def written_buffers(reading: Reading) -> Event:
    """Module buffers that are bad although no operation of the step made them so, and that harmed nothing yet."""
    names = ", ".join(reading.bad_buffers[:3])
    text = f"module buffers {names} are not finite: written to outside the step, and evaluation will use them"
    return Event(kind="module_buffer", severity="warning", subject=reading.bad_buffers[0], message=text)


def rolled_back(step: int, back_to: int | None) -> Event:
    """The state of an earlier step is back."""
    text = (
        f"back to the state at the start of step {back_to:,}" if back_to is not None else "no snapshot yet: step undone"
    )
    return Event(kind="rollback", message=text, severity="warning", data={"from_step": step, "to_step": back_to})


def not_repeated(step: int, back_to: int) -> Event:
    """The steps before this one could not be run again to its start."""
    text = (
        f"the steps since {back_to:,} went bad when they were run again, which they had not: the state is now that of "
        f"step {back_to:,}; name in `stateful` what else they depend on"
    )
    return Event(kind="rollback", message=text, severity="warning", data={"from_step": step, "to_step": back_to})


GONE_BACK_OTHERWISE = (
    "the steps on the way back to its start went otherwise than the first time, so the weights training goes on with "
    "may not be those it had: name in attach(..., stateful=[...]) what else a step depends on, or set snapshot_every=1"
)


def gone_back_otherwise(step: int) -> Event:
    """A step was undone by running others again, and these differed."""
    text = f"step {step:,} is undone, but {GONE_BACK_OTHERWISE}"
    return Event(kind="replayed_differs", subject=str(step), message=text, severity="warning")


def acquitted(reading: Reading, *, scaled: bool) -> Iterator[Event]:
    """What a suspicion came to that was unfounded."""
    if reading.unused_gradients:
        yield unused_gradients(reading, scaled=scaled)
    if reading.bad_buffers:
        yield written_buffers(reading)
