"""The replay-buffer auditor: what is stored, before it is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitykit.errors import UsageError
from stabilitykit.measure.summary import bad_rows
from stabilitykit.measure.values import values
from stabilitykit.schema import BUFFER_ROW

Rows = np.ndarray[Any, np.dtype[np.void]]
_FIELDS = ("examples", "labels", "logits", "task_labels", "uids")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something wrong in the buffer: which field, which slots, what to do."""

    kind: str  # nonfinite, label
    field: str
    slots: tuple[int, ...]
    message: str


@dataclass(frozen=True)
class Audit:
    """The findings, and the row of the `buffer` table."""

    findings: tuple[Finding, ...]
    row: Rows


def audit_buffer(buffer: object) -> tuple[Finding, ...]:
    """Look for non-finite examples and logits and for impossible labels.

    Args:
        buffer: an object or mapping with tensors `examples` [slots, ...], `labels` [slots], `logits` [slots,
            classes] (and
            `task_labels`, `uids` where it has them); slots past `len(buffer)`, where it has a length, are not filled.

    Raises:
        UsageError: it has none of these tensors.
    """
    return full_audit(buffer).findings


def full_audit(buffer: object) -> Audit:
    """Findings and statistics; see `audit_buffer`."""
    fields = _fields(buffer)
    if not fields:
        raise UsageError(
            f"audit_buffer: got a {type(buffer).__name__} without tensors, expected examples, labels or logits with "
            "the slots first; pass the object or mapping that holds them"
        )
    filled = _filled(buffer, fields)
    stored = {name: tensor[:filled] for name, tensor in fields.items()}
    findings = [*_nonfinite(stored), *_labels(stored)]
    return Audit(tuple(findings), _row(fields, stored, filled, findings))


def bad_slots(buffer: object | None) -> tuple[str, tuple[int, ...]]:
    """The first field of a replay buffer with non-finite slots, and the slots; empty where there is none."""
    for name, tensor in _fields(buffer).items() if buffer is not None else ():
        if slots := bad_rows(tensor):
            return name, slots
    return "", ()


def _fields(buffer: object) -> dict[str, Tensor]:
    found = {name: buffer.get(name) if isinstance(buffer, Mapping) else getattr(buffer, name, None) for name in _FIELDS}
    return {name: entry for name, entry in found.items() if isinstance(entry, Tensor) and entry.dim() > 0}


def _filled(buffer: object, fields: Mapping[str, Tensor]) -> int:
    slots = min(len(tensor) for tensor in fields.values())
    if isinstance(buffer, Mapping) or not hasattr(buffer, "__len__"):
        return slots
    return min(len(buffer), slots)


def _nonfinite(stored: Mapping[str, Tensor]) -> list[Finding]:
    found = []
    for name in ("examples", "logits"):
        if name in stored and (slots := bad_rows(stored[name])):
            text = (
                f"replay buffer: {len(slots)} slots of {name} are not finite, expected finite ones; drop {_some(slots)}"
            )
            found.append(Finding(kind="nonfinite", field=name, slots=slots, message=text))
    return found


def _labels(stored: Mapping[str, Tensor]) -> list[Finding]:
    labels = stored.get("labels")
    if labels is None or not len(labels):
        return []
    if labels.is_floating_point():
        text = f"replay buffer: labels are {labels.dtype}, expected integers; store labels.long()"
        return [Finding(kind="label", field="labels", slots=(), message=text)]
    classes = stored["logits"].shape[-1] if "logits" in stored and stored["logits"].dim() > 1 else None
    wrong = (labels < 0) if classes is None else (labels < 0) | (labels >= classes)
    slots = tuple(torch.nonzero(wrong.reshape(len(labels), -1).any(1)).flatten().tolist())
    if not slots:
        return []
    bound = "at least 0" if classes is None else f"0 to {classes - 1}"
    text = f"replay buffer: {len(slots)} labels are out of range, expected {bound}; drop slots {_some(slots)}"
    return [Finding(kind="label", field="labels", slots=slots, message=text)]


def _row(fields: Mapping[str, Tensor], stored: Mapping[str, Tensor], filled: int, findings: list[Finding]) -> Rows:
    row = np.zeros(1, BUFFER_ROW)
    bad = {finding.field: len(finding.slots) for finding in findings}
    num_classes, balance = _balance(stored.get("labels"))
    example, _ = _size(stored.get("examples"))
    logit, logit_l2 = _size(stored.get("logits"))
    row["capacity"] = min(len(tensor) for tensor in fields.values())
    row["filled"] = filled
    row["bad_examples"], row["bad_logits"] = bad.get("examples", 0), bad.get("logits", 0)
    row["bad_labels"] = bad.get("labels", 0)
    row["duplicates"] = -1
    row["num_classes"], row["class_balance"] = num_classes, balance
    row["example_absmax"], row["logit_absmax"], row["logit_l2"] = example, logit, logit_l2
    row["age"] = row["teacher_drift"] = math.nan
    return row


def _balance(labels: Tensor | None) -> tuple[int, float]:
    """How many classes are stored, and the entropy of their shares over that of an even one."""
    if labels is None or labels.is_floating_point() or not len(labels):
        return 0, math.nan
    counts = torch.unique(labels, return_counts=True)[1].double()
    shares = counts / counts.sum()
    entropy = float(-(shares * shares.log()).sum())
    return len(counts), entropy / math.log(len(counts)) if len(counts) > 1 else 1.0


def _size(tensor: Tensor | None) -> tuple[float, float]:
    """Largest magnitude and root mean square of the finite values."""
    plain = values(tensor) if tensor is not None else None
    if plain is None or not plain.numel():
        return math.nan, math.nan
    low, high = torch.aminmax(plain)
    if not math.isfinite(float(low)) or not math.isfinite(float(high)):
        plain = plain[plain.isfinite()]
        low, high = torch.aminmax(plain) if plain.numel() else (torch.tensor(math.nan),) * 2
    wide = torch.linalg.vector_norm(plain, dtype=torch.float64) / math.sqrt(max(plain.numel(), 1))
    return max(abs(float(low)), abs(float(high))), float(wide)


def _some(slots: tuple[int, ...]) -> str:
    return ", ".join(map(str, slots[:8])) + (", ..." if len(slots) > 8 else "")
