"""What a run folder holds: tables, rows, events, diagnoses, and the one version number of the format.

The training process writes what this page says and the reports read it; nothing else is shared between them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np

SCHEMA_VERSION = 1  # additive columns keep it; anything else raises it

Phase = Literal["data", "buffer", "weights", "forward", "backward", "clip", "optimizer", "state"]
Kind = Literal["nan", "inf"]
Proof = Literal["replayed", "replayed-differs", "hooks", "record"]
Ending = Literal["completed", "raised", "killed", "running"]
Role = Literal[
    "input",
    "output",
    "output_gradient",
    "gradient",
    "gradient_clipped",
    "parameter",
    "update",
    "optimizer_state",
    "module_buffer",
]
PHASES: tuple[Phase, ...] = get_args(Phase)
ROLES: tuple[Role, ...] = get_args(Role)  # a row stores the index into this tuple

# One row is one packed record: the log writes it as it lies in memory, the compactor turns it into columns.
# `attempt` and `step` are the frame's, so no row repeats them; both are columns of every parquet table.
STEP_ROW = np.dtype(
    [
        ("micro", "<i4"),  # backwards within the step so far
        ("task", "<i4"),  # -1 where the caller has no tasks
        ("epoch", "<i4"),  # -1 where the caller does not say
        ("wall_time", "<f8"),  # seconds since the epoch, for people; order is by step
        ("seconds", "<f8"),  # duration of the step
        ("loss", "<f8"),
        ("grad_norm", "<f8"),  # L2 over all gradients when backward ends, unscaled
        ("grad_norm_clipped", "<f8"),  # the same when the optimizer starts
        ("clip_coefficient", "<f8"),  # grad_norm_clipped / grad_norm
        ("lr", "<f8"),  # first parameter group; the others are scalars `lr/1`, `lr/2`, ...
        ("parameter_norm", "<f8"),
        ("update_norm", "<f8"),
        ("loss_scale", "<f8"),  # nan without a GradScaler
        ("skipped", "u1"),  # 1: no optimizer stepped, or the step was undone
        ("cadence", "<i4"),  # tensors are recorded every so many steps
        ("cost_seconds", "<f8"),  # what watching this step took
    ]
)
TENSOR_ROW = np.dtype(
    [
        ("micro", "<i4"),
        ("order", "<i4"),  # execution order within the step
        ("call", "<i4"),  # which call of the module, 0-based
        ("tensor", "<i4"),  # id in tensors.json
        ("role", "u1"),  # index into ROLES
        ("phase", "u1"),  # index into PHASES
        ("numel", "<i8"),
        ("nan", "<i8"),
        ("posinf", "<i8"),
        ("neginf", "<i8"),
        ("zeros", "<i8"),
        ("min", "<f8"),  # over the finite values, nan where there are none
        ("max", "<f8"),
        ("mean", "<f8"),
        ("l2", "<f8"),
        ("headroom", "<f4"),  # bits to the dtype's overflow
        ("subnormal", "<f4"),  # share of values under the dtype's smallest normal
        ("unsupported", "u1"),  # 1: a kind of tensor that has no such statistics
    ]
)
SCALAR_ROW = np.dtype([("micro", "<i4"), ("scalar", "<i4"), ("value", "<f8")])
BUFFER_ROW = np.dtype(
    [
        ("capacity", "<i8"),
        ("filled", "<i8"),
        ("bad_examples", "<i8"),  # slots with a NaN or Inf
        ("bad_logits", "<i8"),
        ("bad_labels", "<i8"),  # outside the classes; all of them where they are no integers
        ("duplicates", "<i8"),  # filled slots whose example equals an earlier slot's; -1: not counted
        ("num_classes", "<i8"),
        ("class_balance", "<f8"),  # entropy of the labels / log(num_classes): 1 is even
        ("example_absmax", "<f8"),
        ("logit_absmax", "<f8"),
        ("logit_l2", "<f8"),  # root mean square
        ("age", "<f8"),  # mean steps since insertion, nan where the buffer does not say
        ("teacher_drift", "<f8"),  # root mean square of (stored - current logits), nan where not measured
        ("example_min", "<f8"),  # over the finite values; integers as well
        ("example_max", "<f8"),
        ("least_held", "<i8"),  # slots of the class that has the fewest of those held; -1: no classes
        ("most_held", "<i8"),
        ("age_max", "<f8"),
        ("age_share", "<f8"),  # mean age / age of the run, by insertion step or uid: 0.5 for a uniform reservoir
        ("teacher_agreement", "<f8"),  # share of slots in which stored and current logits rank the same class first
        ("drift_slots", "<i8"),  # slots the drift was measured on
    ]
)
EVENT_COLUMNS = ("wall_time", "kind", "severity", "subject", "message", "data")
ROWS: Mapping[str, np.dtype[np.void]] = {
    "steps": STEP_ROW,
    "tensors": TENSOR_ROW,
    "scalars": SCALAR_ROW,
    "buffer": BUFFER_ROW,
}
TABLES = (*ROWS, "events")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened once: a skipped step, a bad slot, lost rows, a guard that acted.

    `kind` is a short stable word (`nonfinite`, `scaler_skip`, `rollback`, `lost_rows`, `task`, `guard`, ...),
    `severity` is info, warning or error, `subject` names what it is about (a tensor, a guard), `data` holds further
    facts.
    """

    kind: str
    message: str
    severity: Literal["info", "warning", "error"] = "info"
    subject: str = ""
    wall_time: float = 0.0
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TensorSummary:
    """One tensor at one moment, as the verdict prints it: counts of what is not finite, range of what is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    nan: int = 0
    posinf: int = 0
    neginf: int = 0
    zeros: int = 0
    min: float = math.nan
    max: float = math.nan
    mean: float = math.nan
    value: str = ""  # of an argument that is no tensor, a learning rate say

    def describe(self) -> str:
        """One line: `denominator: float32 [24, 3], 24 zeros, range 0 .. 17.2`."""
        if self.value:
            return f"{self.name} = {self.value}"
        counts = [("NaN", self.nan), ("+Inf", self.posinf), ("-Inf", self.neginf), ("zero", self.zeros)]
        parts = [f"{count:,} {label}" for label, count in counts if count]
        parts += [] if math.isnan(self.min) else [f"range {self.min:.4g} .. {self.max:.4g}"]
        return f"{self.name}: {self.dtype} {list(self.shape)}" + "".join(f", {part}" for part in parts)


@dataclass(frozen=True, kw_only=True)
class ChainLink:
    """One operation on the way from the origin to what was noticed, in execution order."""

    phase: Phase
    op: str
    module: str
    file: str
    line: int | None
    code: str
    output: TensorSummary
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class RunUpStep:
    """One step before the fault, re-run densely: its loss, norms, and the tensor nearest to overflow."""

    step: int
    loss: float = math.nan
    grad_norm: float = math.nan
    parameter_norm: float = math.nan
    absmax: float = math.nan
    absmax_tensor: str = ""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a value first became non-finite.

    Attributes:
        step: 0-based count of calls of the replayable function (or of steps, see `Monitor.step_index`).
        phase: data, buffer, weights, forward, backward, clip, optimizer or state.
        kind: `nan` or `inf`, as the origin made it.
        module: qualified name of the innermost module, `""` outside any.
        op: aten base name, `""` where no operation is to blame (a bad sample, a bad checkpoint).
        tensor: parameter, buffer, gradient or input the phase is about, `""` where it has none.
        file: source file of the user's line, relative to the working directory where it lies below it.
        line: 1-based line number, None where no line is to blame.
        code: text of that line.
        samples: rows of the batch (or replay slots, or the caller's indices) that hold or caused it.
        proof: how strong the claim is: `replayed` is a bit-identical re-run of the step.
    """

    step: int
    phase: Phase
    kind: Kind
    module: str = ""
    op: str = ""
    tensor: str = ""
    file: str = ""
    line: int | None = None
    code: str = ""
    samples: tuple[int, ...] = ()
    proof: Proof = "hooks"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """An origin with its evidence: all a report needs, as text and numbers.

    Attributes:
        origin: where it began.
        noticed: what gave it away, `loss`, `gradient of head.weight`, ...
        chain: origin to symptom, a link an operation.
        inputs: statistics of the origin's inputs.
        rule: name of the rule that explained it, `unknown` where none did.
        cause: what happened, in a sentence or two.
        remedies: what to change, best first; each is a line to write or a flag to set.
        run_up: the steps before, oldest first.
        samples_are: what `origin.samples` counts: `rows of the batch`, `replay slots`.
        task: the caller's task number, None without tasks.
    """

    origin: Origin
    noticed: str = ""
    chain: tuple[ChainLink, ...] = ()
    inputs: tuple[TensorSummary, ...] = ()
    rule: str = "unknown"
    cause: str = ""
    remedies: tuple[str, ...] = ()
    run_up: tuple[RunUpStep, ...] = ()
    samples_are: str = "rows of the batch"
    task: int | None = None

    @property
    def verdict(self) -> str:
        """One sentence: step, task, phase, what, where."""
        return verdict(self.origin, self.task)

    def to_json(self) -> str:
        """The text of `diagnosis.json`; NaN and Inf are the strings "nan", "inf", "-inf", since JSON has none."""
        body = {"schema_version": SCHEMA_VERSION, "verdict": self.verdict} | asdict(self)
        return json.dumps(plain(body), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Diagnosis:
        """Read what `to_json` wrote, by any version of the same major schema: unknown keys are left out.

        Raises:
            ValueError: the text is no diagnosis.
        """
        body = json.loads(text)
        if not isinstance(body, dict) or "origin" not in body:
            raise ValueError("diagnosis.json: got no 'origin', expected a diagnosis")
        return cls(
            **_known(cls, body)
            | {
                "origin": Origin(**_known(Origin, body["origin"])),
                "chain": tuple(_chain_link(link) for link in body.get("chain", ())),
                "inputs": tuple(_summary(entry) for entry in body.get("inputs", ())),
                "run_up": tuple(RunUpStep(**_known(RunUpStep, entry)) for entry in body.get("run_up", ())),
            }
        )


def verdict(origin: Origin, task: int | None = None) -> str:
    """The sentence every output opens with: step, task, phase, what, where."""
    head = f"step {origin.step:,}" + (f", task {task}" if task is not None else "")
    what = "NaN" if origin.kind == "nan" else "Inf"
    place = f" at {origin.file}:{origin.line}" if origin.file and origin.line else ""
    return f"{head}: first {what} in the {origin.phase} phase: {_where(origin)}{place}"


def _where(origin: Origin) -> str:
    if not origin.op:
        held = {
            "data": "the batch already held it" if origin.tensor else "a tensor kept outside the step already held it",
            "buffer": "a replayed sample already held it",
            "weights": "the parameter already held it when the step began",
            "state": "the module's buffer already held it when the step began",
        }.get(origin.phase, f"module `{origin.module}`" if origin.module else "outside any module")
        return held + (f" (`{origin.tensor}`)" if origin.tensor else "")
    verb = {"backward": "the derivative of ", "optimizer": "the update's ", "clip": "the clipping's "}
    module = f" in module `{origin.module}`" if origin.module else ""
    about = {"backward": "gradient of ", "clip": "gradient of ", "optimizer": "parameter ", "state": "buffer "}
    tensor = f" ({about.get(origin.phase, '')}`{origin.tensor}`)" if origin.tensor else ""
    return f"{verb.get(origin.phase, '')}`{origin.op}`{module}{tensor}"


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: arrays, tensors, tuples and sets become lists, what else it cannot hold a string."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if callable(tolist := getattr(value, "tolist", None)):  # numpy's and torch's
        return plain(tolist())
    return value if isinstance(value, float) else str(value)


def _known(cls: type[Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `body` that are fields of `cls`, tuples and non-finite floats put back."""
    floats = {entry.name for entry in fields(cls) if entry.type == "float"}
    known = {entry.name: body[entry.name] for entry in fields(cls) if entry.name in body}
    return {
        name: float(entry) if name in floats else tuple(entry) if isinstance(entry, list) else entry
        for name, entry in known.items()
    }


def _summary(body: Mapping[str, Any]) -> TensorSummary:
    return TensorSummary(**_known(TensorSummary, body))


def _chain_link(body: Mapping[str, Any]) -> ChainLink:
    return ChainLink(**_known(ChainLink, body) | {"output": _summary(body["output"])})
