"""The best honest answer without a replay: the first bad module in execution order, forward then backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stabilitykit.diagnose.conclude import Context
from stabilitykit.schema import Diagnosis, Kind, Origin, Phase

_ADVICE = "wrap the step, train_step = monitor.replayable(train_step), to be told the operation and the source line"


@dataclass(frozen=True)
class Passed:
    """A module's output, or its gradient, as it passed: its L2 norm says whether it was finite."""

    module: str
    norm: float

    @property
    def bad(self) -> bool:
        """Whether it was not finite."""
        return not math.isfinite(self.norm)


@dataclass(frozen=True, kw_only=True)
class Symptoms:
    """What the hooks and the sentinel saw in one step, each in the order it happened.

    Attributes:
        inputs: the root module's tensor inputs, by argument.
        outputs: of every module, innermost first: a module returns after those it calls.
        output_gradients: of the same outputs, in the order of backward.
        before: parameters that were bad before the step.
        stored: a field of the replay buffer and its slots that are not finite.
    """

    inputs: Sequence[Passed] = ()
    outputs: Sequence[Passed] = ()
    output_gradients: Sequence[Passed] = ()
    before: Sequence[str] = ()
    stored: tuple[str, tuple[int, ...]] = ("", ())
    losses: Sequence[str] = ()
    gradients: Sequence[str] = ()
    clipped: Sequence[str] = ()
    parameters: Sequence[str] = ()
    buffers: Sequence[str] = ()


@dataclass(frozen=True)
class _Place:
    phase: Phase
    module: str
    tensor: str
    kind: Kind
    cause: str


def by_hooks(symptoms: Symptoms, context: Context) -> Diagnosis:
    """The diagnosis that hooks alone allow; its proof is `hooks`, and it names no operation."""
    place = _forward(symptoms) or _backward(symptoms) or _after(symptoms)
    origin = Origin(
        step=context.step, phase=place.phase, kind=place.kind, module=place.module, tensor=place.tensor, proof="hooks"
    )
    noticed = next(iter((*symptoms.losses, *symptoms.gradients, *symptoms.parameters, *symptoms.buffers)), "")
    return Diagnosis(
        origin=origin,
        noticed=noticed,
        rule="hooks",
        cause=place.cause,
        remedies=(_ADVICE,),
        run_up=tuple(context.run_up),
        task=context.task,
    )


def _forward(symptoms: Symptoms) -> _Place | None:
    bad = next((passed for passed in symptoms.outputs if passed.bad), None)
    if bad is None and not symptoms.losses:
        return None
    first = bad.module if bad is not None else ""
    given = next((passed for passed in symptoms.inputs if passed.bad), None)
    if given is not None and bad is not None:
        return _Place("data", "", given.module, _kind(given), "The model's input was not finite when it was called.")
    field, slots = symptoms.stored
    if slots:
        return _Place("buffer", "", field, "nan", f"The replay buffer's {field} were not finite in slots {slots[:8]}.")
    if symptoms.before:
        name = next((entry for entry in symptoms.before if entry.rpartition(".")[0] == first), symptoms.before[0])
        text = "The parameter was not finite when the step began."
        return _Place("weights", name.rpartition(".")[0], name, "nan", text)
    if bad is None:
        return _Place("forward", "", "", "nan", "All module outputs were finite: the loss itself made the value.")
    return _Place(
        "forward", first, "", _kind(bad), "The first module, in execution order, whose output was not finite."
    )


def _backward(symptoms: Symptoms) -> _Place | None:
    if not symptoms.gradients:
        return None
    bad = next((passed for passed in symptoms.output_gradients if passed.bad), None)
    if bad is None:
        name = symptoms.gradients[-1]
        text = "The gradients of all module outputs were finite, this parameter's own gradient was not."
        return _Place("backward", name.rpartition(".")[0], name, "nan", text)
    order = [passed.module for passed in symptoms.outputs]
    after = order[order.index(bad.module) + 1 :] if bad.module in order else []
    text = (
        f"The gradient that reached the output of `{bad.module or '(root)'}` was not finite: what follows it made it."
    )
    return _Place("backward", after[0] if after else "", symptoms.gradients[0], _kind(bad), text)


def _after(symptoms: Symptoms) -> _Place:
    if symptoms.clipped:
        name = symptoms.clipped[0]
        text = "The gradients were finite when backward ended and were not when the optimizer started."
        return _Place("clip", name.rpartition(".")[0], name, "nan", text)
    if symptoms.parameters:
        name = symptoms.parameters[0]
        text = "Gradients and parameters were finite before the update: the update made the value."
        return _Place("optimizer", name.rpartition(".")[0], name, "nan", text)
    name = symptoms.buffers[0] if symptoms.buffers else ""
    return _Place("state", name.rpartition(".")[0], name, "inf", "The module's buffer was finite before the step.")


def _kind(passed: Passed) -> Kind:
    return "nan" if math.isnan(passed.norm) else "inf"
