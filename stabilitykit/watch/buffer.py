"""The replay-buffer auditor: what is stored, before it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabilitykit.errors import UsageError
from stabilitykit.measure.summary import bad_rows
from stabilitykit.measure.values import values
from stabilitykit.schema import BUFFER_ROW
from stabilitykit.watch.contents import Ages, Bounds, ages, bounds, class_counts, evenness, root_mean_square
from stabilitykit.watch.duplicates import repeated_slots
from stabilitykit.watch.teacher import Drift, Forward, teacher_drift

Rows = np.ndarray[Any, np.dtype[np.void]]
FIELDS = ("examples", "labels", "logits", "task_labels", "uids")
INSERTED = ("inserted_steps", "inserted_step", "uids")  # when a slot was filled: by step, else by number of the offer
OFFERED = {
    "inserted_steps": ("num_steps",),
    "inserted_step": ("num_steps",),
    "uids": ("n_seen", "num_seen_examples", "num_seen"),
}
CAPACITY = ("capacity", "buffer_size")  # of a buffer whose tensors are views of the filled slots
IGNORED = -100  # torch's own label for "no class here", in dense labels
MANY_REPEATED = 0.25  # a reservoir over many epochs of a set ten times its size repeats about one slot in twenty
FEW_REPEATED = 8  # prove nothing: a buffer that is just being filled, a toy
_SQUARES_TO_32, _SQUARES_TO_64 = (math.sqrt(torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong in the buffer: which field, which slots, what to do."""

    kind: str  # nonfinite, range, label, duplicate, length, teacher
    field: str
    slots: tuple[int, ...]
    message: str


@dataclass(frozen=True)
class Audit:
    """The findings, and the row of the `buffer` table."""

    findings: tuple[Finding, ...]
    row: Rows


def audit_buffer(
    buffer: object, model: nn.Module | Forward | None = None, *, preprocess: Forward | None = None, sample: int = 64
) -> tuple[Finding, ...]:
    """Look for values that will do harm when they are drawn, and for a buffer that remembers less than it should.

    Found are examples and logits that are not finite, or whose square overflows; labels that no class has; examples
    stored over and over; fields of different lengths; and, with a model, logits that it no longer stands by.

    Args:
        buffer: an object or mapping with tensors `examples` [slots, ...], `labels` [slots], `logits` [slots,
            classes] (and `task_labels`, `uids`, `inserted_steps` where it has them); slots past `len(buffer)`, where
            it has a length, are not filled.
        model: the current network. A copy of it is run, in eval mode: the live one, its running statistics and the
            random streams stay as they are. Any other callable is called as it is.
        preprocess: turns stored examples into the model's input, a normalisation say.
        sample: slots to run it on, evenly spaced.

    Raises:
        UsageError: it has none of these tensors, or the model cannot be compared with what is stored.
    """
    return full_audit(buffer, model, preprocess=preprocess, sample=sample).findings


def full_audit(
    buffer: object, model: nn.Module | Forward | None = None, *, preprocess: Forward | None = None, sample: int = 64
) -> Audit:
    """Findings and statistics; see `audit_buffer`."""
    fields = _fields(buffer)
    if not fields:
        raise UsageError(
            f"audit_buffer: got a {type(buffer).__name__} without tensors, expected examples, labels or logits with "
            "the slots first; pass the object or mapping that holds them"
        )
    if sample < 1:
        raise UsageError(f"audit_buffer: got sample={sample}, expected 1 or more slots")
    stored = {name: tensor[: _filled(buffer, fields)] for name, tensor in fields.items()}
    examples, logits = stored.get("examples"), stored.get("logits")
    ranges = {name: bounds(stored.get(name)) for name in ("examples", "logits")}
    repeated = repeated_slots(examples) if examples is not None else None
    drift = Drift()
    if model is not None and examples is not None and logits is not None:
        unfit = {slot for known in ranges.values() for slot in known.bad}
        drift = teacher_drift(model, examples, logits, unfit=unfit, preprocess=preprocess, sample=sample)
    findings = (
        *_lengths(fields),
        *_nonfinite(ranges),
        *_out_of_range(stored, ranges),
        *_labels(stored),
        *_repeated(repeated, len(next(iter(stored.values())))),
        *_drifted(drift),
    )
    row = np.zeros(1, BUFFER_ROW)
    row["capacity"] = max(_number(buffer, CAPACITY), *map(len, fields.values()))
    row["duplicates"] = -1 if repeated is None else len(repeated)
    row["teacher_drift"], row["teacher_agreement"], row["drift_slots"] = drift.rms, drift.agreement, drift.num_slots
    _count(row, findings)
    _describe(row, stored, ranges)
    _date(row, buffer, stored)
    return Audit(findings, row)


def preprocessing(buffer: object) -> Forward | None:
    """What turns stored examples into the model's input, where the buffer has it as `preprocess`."""
    found = _entry(buffer, "preprocess")
    return found if callable(found) else None


def bad_slots(buffer: object | None) -> tuple[str, tuple[int, ...]]:
    """The first field of a replay buffer with non-finite slots, and the slots; empty where there is none."""
    for name, tensor in _fields(buffer).items() if buffer is not None else ():
        if name in FIELDS and (slots := bad_rows(tensor)):
            return name, slots
    return "", ()


def _fields(buffer: object) -> dict[str, Tensor]:
    found = {name: _entry(buffer, name) for name in dict.fromkeys((*FIELDS, *INSERTED))}
    return {name: entry for name, entry in found.items() if isinstance(entry, Tensor) and entry.dim() > 0}


def _entry(buffer: object, name: str) -> Any:
    return buffer.get(name) if isinstance(buffer, Mapping) else getattr(buffer, name, None)


def _number(buffer: object, names: tuple[str, ...]) -> int:
    """The first of these numbers that the buffer holds, 0 where it has none."""
    return next((entry for name in names if isinstance(entry := _entry(buffer, name), int)), 0)


def _filled(buffer: object, fields: Mapping[str, Tensor]) -> int:
    """How many slots are filled, as far as the buffer says: the length of a mapping or tuple is another matter."""
    slots = min(map(len, fields.values()))
    if isinstance(buffer, Mapping | tuple) or not hasattr(buffer, "__len__"):
        return slots
    return min(len(buffer), slots)


# Findings.


def _lengths(fields: Mapping[str, Tensor]) -> list[Finding]:
    if len({len(tensor) for tensor in fields.values()}) == 1:
        return []
    shown = ", ".join(f"{name} {len(tensor):,}" for name, tensor in fields.items())
    text = f"replay buffer: the fields have different lengths ({shown}), expected one slot each; store them together"
    return [Finding(kind="length", field=min(fields, key=lambda name: len(fields[name])), slots=(), message=text)]


def _nonfinite(ranges: Mapping[str, Bounds]) -> list[Finding]:
    found = []
    for name, known in ranges.items():
        if slots := known.bad:
            text = (
                f"replay buffer: {len(slots)} slots of {name} are not finite, expected finite ones; drop {_some(slots)}"
            )
            found.append(Finding(kind="nonfinite", field=name, slots=slots, message=text))
    return found


def _out_of_range(stored: Mapping[str, Tensor], ranges: Mapping[str, Bounds]) -> list[Finding]:
    """Finite values whose square is not: a squared error, a variance or a norm of them is Inf."""
    found = []
    for name, known in ranges.items():
        limit = _SQUARES_TO_64 if name in stored and stored[name].dtype == torch.float64 else _SQUARES_TO_32
        if not known.absmax > limit or not (slots := _beyond(stored[name], limit)):
            continue
        text = (
            f"replay buffer: {len(slots)} slots of {name} hold magnitudes beyond {limit:.3g}, whose square overflows; "
            f"drop {_some(slots)}, and bound what is stored"
        )
        found.append(Finding(kind="range", field=name, slots=slots, message=text))
    return found


def _beyond(tensor: Tensor, limit: float) -> tuple[int, ...]:
    plain = values(tensor)
    if plain is None or tensor.is_nested or tensor.layout != torch.strided:
        return ()
    large = (plain.abs() > limit) & plain.isfinite()
    return tuple(torch.nonzero(large.reshape(len(large), -1).any(1)).flatten().tolist())


def _labels(stored: Mapping[str, Tensor]) -> list[Finding]:
    labels = stored.get("labels")
    if labels is None or not len(labels):
        return []
    classes = _num_classes(labels, stored.get("logits"))
    if labels.is_floating_point() or labels.is_complex():
        return _float_labels(labels, classes)
    wrong = (labels < 0) if classes is None else (labels < 0) | (labels >= classes)
    if labels.dim() > 1:
        wrong &= labels != IGNORED
    slots = tuple(torch.nonzero(wrong.reshape(len(labels), -1).any(1)).flatten().tolist())
    if not slots:
        return []
    bound = "at least 0" if classes is None else f"0 to {classes - 1}"
    text = f"replay buffer: {len(slots)} labels are out of range, expected {bound}; drop slots {_some(slots)}"
    return [Finding(kind="label", field="labels", slots=slots, message=text)]


def _float_labels(labels: Tensor, classes: int | None) -> list[Finding]:
    """Class numbers must be integers; targets of a regression and class probabilities are floats by right."""
    if labels.dim() == 1 and classes is not None:
        text = f"replay buffer: labels are {labels.dtype}, expected integers; store labels.long()"
        return [Finding(kind="label", field="labels", slots=tuple(range(len(labels))), message=text)]
    slots = bad_rows(labels)
    text = f"replay buffer: {len(slots)} labels are not finite, expected finite targets; drop slots {_some(slots)}"
    return [Finding(kind="nonfinite", field="labels", slots=slots, message=text)] if slots else []


def _num_classes(labels: Tensor, logits: Tensor | None) -> int | None:
    """How many classes the logits have, by where cross_entropy or a language model puts them; None: not known."""
    if logits is None or logits.dim() != labels.dim() + 1:
        return None
    shape = logits.shape
    if shape[:1] + shape[2:] == labels.shape:
        return shape[1]
    return shape[-1] if shape[:-1] == labels.shape else None


def _repeated(repeated: tuple[int, ...] | None, filled: int) -> list[Finding]:
    if repeated is None or len(repeated) <= max(FEW_REPEATED, MANY_REPEATED * filled):
        return []
    text = (
        f"replay buffer: {len(repeated)} of {filled} slots hold an example that an earlier slot holds, expected few; "
        "offer each example once, and store a copy of it"
    )
    return [Finding(kind="duplicate", field="examples", slots=repeated, message=text)]


def _drifted(drift: Drift) -> list[Finding]:
    if not drift.rms > drift.stored_rms:  # also where nothing was compared
        return []
    text = (
        f"replay buffer: the stored logits differ from the current model's by {drift.rms:.3g} (root mean square over "
        f"{drift.num_slots} slots), more than their own size of {drift.stored_rms:.3g}; store them anew, or check "
        "that the model gets the examples as it did when they were stored (preprocess=...)"
    )
    return [Finding(kind="teacher", field="logits", slots=(), message=text)]


def _some(slots: tuple[int, ...]) -> str:
    return ", ".join(map(str, slots[:8])) + (", ..." if len(slots) > 8 else "")


# Statistics.


def _count(row: Rows, findings: tuple[Finding, ...]) -> None:
    bad = {finding.field: len(finding.slots) for finding in findings if finding.kind in ("nonfinite", "label")}
    for name in ("examples", "logits", "labels"):
        row[f"bad_{name}"] = bad.get(name, 0)


def _describe(row: Rows, stored: Mapping[str, Tensor], ranges: Mapping[str, Bounds]) -> None:
    """How many slots are filled, their class balance and range."""
    counts = class_counts(stored.get("labels"))
    examples, logits = ranges["examples"], ranges["logits"]
    row["filled"] = len(next(iter(stored.values())))
    row["num_classes"], row["class_balance"] = len(counts), evenness(counts)
    row["least_held"], row["most_held"] = min(counts, default=-1), max(counts, default=-1)
    row["example_min"], row["example_max"], row["example_absmax"] = examples.low, examples.high, examples.absmax
    row["logit_absmax"], row["logit_l2"] = logits.absmax, root_mean_square(stored.get("logits"))


def _date(row: Rows, buffer: object, stored: Mapping[str, Tensor]) -> None:
    """Ages in steps where the buffer holds them; as shares of the run also where it only numbers its offers."""
    name = next((name for name in INSERTED if name in stored), "")
    found = ages(stored[name], _number(buffer, OFFERED[name])) if name else Ages()
    in_steps = name != "uids"
    row["age"], row["age_max"] = (found.mean, found.largest) if in_steps else (math.nan, math.nan)
    row["age_share"] = found.share
