"""From a finding in the provenance graph to the Diagnosis that is printed, stored and raised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from stabilitykit.diagnose.graph import Leaf, Operation
from stabilitykit.diagnose.rules import Evidence, explain
from stabilitykit.diagnose.walk import Finding
from stabilitykit.schema import ChainLink, Diagnosis, Kind, Origin, Phase, Proof, RunUpStep

MAX_CHAIN = 60  # links shown; the middle of a longer chain is left out and counted
_LEAF_PHASES: Mapping[str, Phase] = {
    "parameter": "weights",
    "batch": "data",
    "replay": "buffer",
    "module_buffer": "state",
    "gradient": "backward",
    "optimizer_state": "optimizer",
    "hyperparameter": "optimizer",
    "unknown": "data",
}


@dataclass(frozen=True, kw_only=True)
class Context:
    """What the monitor knows of the step beside its trace."""

    step: int
    proof: Proof
    task: int | None = None
    batch_size: int | None = None
    sample_ids: Sequence[int] | None = None
    run_up: Sequence[RunUpStep] = ()
    hyperparameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by parameter name
    optimizer: str = ""
    loss_was_finite: bool = False
    noticed_in: int | None = None  # the step, where it is not that of the origin


def conclude(finding: Finding, context: Context) -> Diagnosis:
    """The diagnosis of one finding."""
    phase = _phase(finding)
    tensor = _tensor(finding, phase)
    samples, samples_are = _samples(finding, phase, context)
    origin = _origin(finding, phase, tensor, samples, context)
    evidence = Evidence(
        finding=finding,
        phase=phase,
        kind=origin.kind,
        tensor=tensor,
        run_up=context.run_up,
        hyperparameters=context.hyperparameters.get(tensor, {}),
        optimizer=context.optimizer,
        loss_was_finite=context.loss_was_finite,
    )
    rule, cause, remedies = explain(evidence)
    inputs = finding.origin.inputs if isinstance(finding.origin, Operation) else (finding.origin.summary,)
    return Diagnosis(
        origin=origin,
        noticed=finding.symptom.text + ("" if context.noticed_in is None else f" of step {context.noticed_in:,}"),
        chain=_chain(finding.path),
        inputs=inputs,
        rule=rule,
        cause=cause,
        remedies=remedies,
        run_up=tuple(context.run_up),
        samples_are=samples_are,
        task=context.task,
    )


def _origin(finding: Finding, phase: Phase, tensor: str, samples: tuple[int, ...], context: Context) -> Origin:
    kind = cast("Kind", finding.kind)
    source = finding.origin
    common: dict[str, Any] = {"step": context.step, "phase": phase, "kind": kind, "tensor": tensor, "samples": samples}
    if isinstance(source, Leaf):
        module = tensor.rpartition(".")[0] if phase in ("weights", "state", "optimizer") else ""
        return Origin(**common, module=module, proof=context.proof)
    module = tensor.rpartition(".")[0] if phase in ("optimizer", "clip") else source.module
    return Origin(
        **common,
        module=module,
        op=source.op,
        file=source.site.shown,
        line=source.site.line or None,
        code=source.site.code,
        proof=context.proof,
    )


def _phase(finding: Finding) -> Phase:
    source = finding.origin
    if isinstance(source, Leaf):
        return _phase_of_unknown(finding) if source.kind == "unknown" else _LEAF_PHASES[source.kind]
    if source.phase not in ("forward", "clip"):
        return source.phase
    if finding.symptom.role == "module_buffer":
        return "state"
    return _phase_by_hand(finding, source) if source.aside or source.phase == "clip" else source.phase


def _phase_of_unknown(finding: Finding) -> Phase:
    """Of a tensor that only the caller's code knew: what it was loaded into, else where it was used."""
    loaded = _loaded(finding)
    if loaded is not None:
        return "weights" if loaded.writes_kind == "parameter" else "state"
    used = finding.path[0].phase if finding.path else "data"
    return used if used in ("clip", "optimizer") else "data"


def _loaded(finding: Finding) -> Operation | None:
    """The copy of a bad tensor into a parameter or module buffer, if that is how it came into the step."""
    first = finding.path[0] if finding.path and isinstance(finding.origin, Leaf) else None
    return first if first is not None and first.loads else None


def _phase_by_hand(finding: Finding, source: Operation) -> Phase:
    """What code after backward was about: what it wrote first says so, else what showed the harm."""
    wrote = _first_write(finding)
    if wrote is not None:
        return "clip" if wrote.writes_kind == "gradient" else "optimizer"
    role = finding.symptom.role
    shown: Mapping[str, Phase] = {
        "gradient_clipped": "clip",
        "parameter": "optimizer",
        "loss": "forward",
        "probed": "forward",
        "returned": "forward",
    }
    return shown.get(role, source.phase)


def _first_write(finding: Finding) -> Operation | None:
    return next((entry for entry in finding.path if entry.writes_kind in ("gradient", "parameter")), None)


def _tensor(finding: Finding, phase: Phase) -> str:
    """The parameter, module buffer, gradient or batch entry the phase is about."""
    source, symptom = finding.origin, finding.symptom
    if isinstance(source, Leaf) and source.name and phase != "optimizer":
        return source.name
    if (loaded := _loaded(finding)) is not None:
        return loaded.writes
    is_tensor = symptom.role not in ("loss", "probed", "returned", "error")
    if phase in ("optimizer", "clip", "state"):
        wrote = _first_write(finding)
        return (is_tensor and symptom.name) or (wrote.writes if wrote else "") or _own_name(source)
    return symptom.name if phase == "backward" and symptom.role.startswith("gradient") else ""


def _own_name(source: Operation | Leaf) -> str:
    return source.writes if isinstance(source, Operation) else source.name


def _samples(finding: Finding, phase: Phase, context: Context) -> tuple[tuple[int, ...], str]:
    source = finding.origin
    if phase == "buffer" and isinstance(source, Leaf):
        drawn = set(finding.entry.slots) if finding.entry is not None else set()
        return tuple(row for row in source.rows if not drawn or row in drawn), "replay slots"
    if phase in ("weights", "optimizer", "clip", "state"):
        return (), "rows of the batch"
    shape = source.summary.shape if isinstance(source, Leaf) else source.output.shape
    if not shape or shape[0] != context.batch_size:
        return (), "rows of the batch"
    if context.sample_ids is not None and len(context.sample_ids) == context.batch_size:
        return tuple(int(context.sample_ids[row]) for row in source.rows), "samples of the data set"
    return source.rows, "rows of the batch"


def _chain(path: Sequence[Operation]) -> tuple[ChainLink, ...]:
    links = [_link(operation) for operation in path]
    if len(links) <= MAX_CHAIN:
        return tuple(links)
    head, tail = links[: MAX_CHAIN // 2], links[-MAX_CHAIN // 2 :]
    gap = ChainLink(
        phase=tail[0].phase,
        op=f"... {len(links) - MAX_CHAIN} operations ...",
        module="",
        file="",
        line=None,
        code="",
        output=tail[0].output,
    )
    return (*head, gap, *tail)


def _link(operation: Operation) -> ChainLink:
    notes = [f"in {operation.node}"] if operation.node else []
    notes += [f"kernel {operation.kernel}"] if operation.kernel != operation.op else []
    notes += [f"writes {operation.writes}"] if operation.writes else []
    return ChainLink(
        phase=operation.phase,
        op=operation.op,
        module=operation.module,
        file=operation.site.shown,
        line=operation.site.line or None,
        code=operation.site.code,
        output=operation.output,
        note=", ".join(notes),
    )
