"""What a replay buffer holds, in numbers: ranges, class balance, ages; called by the auditor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stabilitykit.measure.values import values


@dataclass(frozen=True)
class Bounds:
    """The range of a tensor's finite values, nan where there are none, and the slots in which not all are finite."""

    low: float = math.nan
    high: float = math.nan
    bad: tuple[int, ...] = ()

    @property
    def absmax(self) -> float:
        """The largest finite magnitude."""
        return max(abs(self.low), abs(self.high))


def bounds(tensor: Tensor | None) -> Bounds:
    """The range of any tensor that can be read, integers included, slot by slot: two passes at memory speed."""
    plain = None if tensor is None else tensor if is_integer(tensor) else values(tensor)
    if plain is None or not plain.numel():
        return Bounds()
    rows = plain.reshape(len(plain), -1)
    low, high = rows.amin(1), rows.amax(1)
    wrong = ~(low.isfinite() & high.isfinite())
    bad = tuple(wrong.nonzero().flatten().tolist())
    if bad:
        held = rows[wrong]
        kept = torch.cat([low[~wrong], high[~wrong], held[held.isfinite()]])
        low = high = kept if kept.numel() else torch.tensor([math.nan])
    one_a_slot = tensor is not None and plain.shape[:1] == tensor.shape[:1] and tensor.layout == torch.strided
    return Bounds(float(low.amin()), float(high.amax()), bad if one_a_slot else ())


def is_integer(tensor: Tensor) -> bool:
    """Whether the tensor holds integers that can be read."""
    kinds = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    return tensor.dtype in kinds and tensor.device.type != "meta" and tensor.layout == torch.strided


def class_counts(labels: Tensor | None) -> list[int]:
    """Slots of each class that is held."""
    if labels is None or labels.dim() > 1 or not (is_integer(labels) or labels.dtype == torch.bool):
        return []
    held, counts = torch.unique(labels, return_counts=True)
    return [count for label, count in zip(held.tolist(), counts.tolist(), strict=True) if label >= 0]


def evenness(counts: list[int]) -> float:
    """The entropy of the classes' shares over that of an even one: 1 is even, nan without classes."""
    if len(counts) < 2:
        return 1.0 if counts else math.nan
    shares = np.array(counts) / sum(counts)
    return float(-(shares * np.log(shares)).sum()) / math.log(len(counts))


def root_mean_square(tensor: Tensor | None) -> float:
    """Over the finite values, in float64; nan where there are none."""
    plain = values(tensor) if tensor is not None else None
    if plain is None or not plain.numel():
        return math.nan
    size = float(torch.linalg.vector_norm(plain, dtype=torch.float64))
    if not math.isfinite(size):
        plain = plain[plain.isfinite()]
        size = float(torch.linalg.vector_norm(plain, dtype=torch.float64))
    return size / math.sqrt(plain.numel()) if plain.numel() else math.nan


@dataclass(frozen=True)
class Ages:
    """How long the slots have been held, in the unit of what they were stamped with, and as a share of the run."""

    mean: float = math.nan
    largest: float = math.nan
    share: float = math.nan


def ages(stamps: Tensor, offered: int) -> Ages:
    """The ages behind ascending stamps (insertion steps, numbers of the offers).

    Args:
        stamps: integers [slots].
        offered: how many stamps were given out so far, 0 where that is not known: the newest slot is then the latest.
    """
    if not is_integer(stamps) or not len(stamps):
        return Ages()
    inserted = stamps.double()
    latest = max(offered - 1.0, float(inserted.max()))
    passed = latest - inserted
    mean = float(passed.mean())
    return Ages(mean, float(passed.max()), mean / latest if latest > 0 else math.nan)
