"""What the guards ask of tensors: finite or not, which rows, which norm, which label; pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stabilitykit.errors import NonFiniteError, StabilityKitError, UsageError
from stabilitykit.measure.norms import combine, tensor_norms, transfer
from stabilitykit.measure.summary import bad_rows
from stabilitykit.measure.values import is_finite, ordinary, values
from stabilitykit.schema import Phase

FEW = 256  # labels that are brought to the host sooner than their extremes are found


@dataclass(frozen=True)
class Problem:
    """Why a step is not sound: what was wrong, where a diagnosis would file it, and which rows it was.

    `stateless`: it cannot lie in weights or optimizer, so that an older state would be no better.
    """

    what: str
    phase: Phase
    tensor: str = ""
    rows: tuple[int, ...] = ()
    error: type[StabilityKitError] = NonFiniteError  # what it is raised as
    stateless: bool = False


def first_bad(named: Iterable[tuple[str, Tensor | None]]) -> str:
    """Name of the first tensor with a NaN or Inf, empty when there is none; one transfer to the host.

    Norms come first, since they are fused and cheap; one that is not finite may be an overflow, so extremes decide.
    """
    return first_bad_of(measured(named))


def measured(named: Iterable[tuple[str, Tensor | None]]) -> list[tuple[str, Tensor, float]]:
    """Tensors with names and norms, in one transfer; the norm of finite values above 1e19 may be infinite."""
    present = [
        (name, tensor)
        for name, tensor in named
        if tensor is not None and (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel()
    ]
    with torch.no_grad():
        found = norms([tensor for _, tensor in present])
    return [(name, tensor, norm) for (name, tensor), norm in zip(present, found, strict=True)]


def norms(tensors: list[Tensor]) -> list[float]:
    """L2 norms of tensors of any kind, in one transfer."""
    plain = bool(tensors) and all(map(ordinary, tensors))
    return transfer(torch._foreach_norm(tensors) if plain else tensor_norms(tensors))


def first_bad_of(tensors: Iterable[tuple[str, Tensor, float]]) -> str:
    """Name of the first that holds a NaN or Inf."""
    return next((name for name, tensor, norm in tensors if not math.isfinite(norm) and not is_finite(tensor)), "")


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Whether nothing is NaN or Inf; integers are always finite."""
    return not first_bad(("tensor", tensor) for tensor in tensors)


def finite_rows(tensor: Tensor) -> Tensor:
    """Which rows hold nothing but finite values, (N,) bool; true where a row is empty."""
    return tensor.isfinite().flatten(1).all(1) if tensor.dim() > 1 else tensor.isfinite()


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """L2 norm over all gradients that no finite gradient overflows or underflows: 1e25 in float32 has one.

    Fused norms first; a tensor whose own came out infinite or zero is measured again in float64.
    """
    tensors = list(gradients)
    found = norms(tensors)
    for index, norm in enumerate(found):
        if norm == 0 or not math.isfinite(norm):
            plain = values(tensors[index])
            found[index] = float(torch.linalg.vector_norm(plain, dtype=torch.float64)) if plain is not None else 0.0
    return math.nan if any(map(math.isnan, found)) else combine(found)


def in_range(labels: Tensor, num_classes: int) -> bool:
    """Whether all labels are classes, from 0 to one less than `num_classes`."""
    if not labels.numel():
        return True
    few = labels.dim() == 1 and len(labels) <= FEW
    found: list[int] = labels.tolist() if few else torch.stack(labels.aminmax()).tolist()
    return min(found) >= 0 and max(found) < num_classes


def label_problem(labels: Tensor, num_classes: int, ignore_index: int = -100) -> Problem | None:
    """What is wrong with class labels: `isfinite` is always true of integers, and an index out of range kills CUDA.

    Args:
        labels: (B,) expected int64 in [0, num_classes).
        num_classes: width of the head.
        ignore_index: a label that the loss leaves out.
    """
    if labels.dtype != torch.int64:
        return Problem(
            f"labels: got {labels.dtype}, expected torch.int64; convert them when loading",
            "data",
            "labels",
            (),
            UsageError,
        )
    if in_range(labels, num_classes):
        return None
    wrong = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if not wrong.any():
        return None
    rows = tuple(wrong.flatten().nonzero().flatten().tolist())
    text = f"labels: got {int(labels.flatten()[rows[0]])}, expected 0 to {num_classes - 1}; check the dataset's labels"
    return Problem(text, "data", "labels", rows, UsageError)


def input_problem(named: Sequence[tuple[str, Tensor]]) -> Problem | None:
    """The first input with a NaN or Inf, and its rows."""
    name = first_bad(named)
    if not name:
        return None
    rows = bad_rows(dict(named)[name])
    return Problem(f"{name.lstrip('.')}: NaN or Inf in rows {', '.join(map(str, rows[:8]))}", "data", name, rows)
