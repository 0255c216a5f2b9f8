"""The statistics of one recorded tensor, packed for one transfer a step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.measure.values import values

BLOCK = 1 << 17  # values looked at while they lie in the cache
FEW = 1 << 11  # up to here numpy's call costs less than torch's, beyond torch's kernel wins
SQUARES_FIT = (1e-30, 1e30)  # within, float32 neither overflows in a sum of squares nor loses the largest ones
FIELDS = ("nan", "posinf", "neginf", "zeros", "min", "max", "mean", "l2", "subnormal")
Numbers = tuple[float, ...]


def statistics(tensor: Tensor) -> Tensor | None:
    """Counts of NaN, +Inf, -Inf and zeros; min, max, mean and L2 norm over the finite values; share of subnormals.

    Sums are taken in float32 over blocks and in float64 over all; where a square could overflow or vanish, in float64
    of values scaled by the largest magnitude.

    Returns:
        float64 [9], in the order of `FIELDS`, on the tensor's device; None where `tensor` is no real or complex
        floating tensor with values to read (see `measure.values`), or is empty.
    """
    found = measure(tensor)
    return torch.tensor(found, dtype=torch.float64) if isinstance(found, tuple) else found


def measure(tensor: Tensor) -> Numbers | Tensor | None:
    """As `statistics`, but plain numbers where the host can read them without a transfer."""
    plain = values(tensor)
    if plain is None or plain.numel() == 0:
        return None
    flat = plain.reshape(-1)
    numbers = _on_host(flat) if flat.device.type == "cpu" and type(flat) is Tensor else None
    return _with_nonfinite(flat) if numbers is None else numbers


def _on_host(flat: Tensor) -> Numbers | None:
    """The statistics of a finite tensor, memory read once; None where a value is not finite.

    On the CPU numpy compares, counts and bounds up to ten times faster than torch does, at a third of the call.
    """
    tiny, size = torch.finfo(flat.dtype).tiny, flat.numel()
    low, high, mean, l2, zeros, small = math.inf, -math.inf, 0.0, 0.0, 0, 0
    for block in (flat,) if size <= BLOCK else torch.split(flat, BLOCK):
        wide = block if block.dtype in (torch.float32, torch.float64) else block.float()
        part = wide.numpy()
        least, most = float(np.minimum.reduce(part)), float(np.maximum.reduce(part))
        if not (math.isfinite(least) and math.isfinite(most)):
            return None
        low, high = min(low, least), max(high, most)
        if least < tiny and most > -tiny and (near := _count_within(part, tiny)):
            small += near
            zeros += int(np.count_nonzero(part == 0))
        block_mean, block_l2 = _sums(wide, part, max(-least, most))
        mean += block_mean * (len(part) / size)
        l2 = math.hypot(l2, block_l2)
    return 0, 0, 0, zeros, low, high, mean, l2, (small - zeros) / size


def _count_within(part: NDArray[Any], bound: float) -> int:
    """How many magnitudes lie below `bound`: two comparisons, where `abs` would write four times the bytes."""
    inside = part < bound
    inside ^= part <= -bound
    return int(np.count_nonzero(inside)) if inside.any() else 0


def _sums(block: Tensor, part: NDArray[Any], largest: float) -> tuple[float, float]:
    """The mean and the L2 norm; `largest` is the largest magnitude, by which squares that do not fit are scaled."""
    if SQUARES_FIT[0] < largest * largest < SQUARES_FIT[1] / len(part):
        if len(part) <= FEW:
            return float(np.add.reduce(part)) / len(part), math.sqrt(part.dot(part))
        return block.sum().item() / len(part), math.sqrt(torch.dot(block, block).item())
    scaled = block.double() / (largest or 1.0)
    return scaled.mean().item() * largest, math.sqrt(torch.dot(scaled, scaled).item()) * largest


def _with_nonfinite(flat: Tensor) -> Tensor:
    zeros = flat.numel() - torch.count_nonzero(flat)
    subnormal = (flat.abs() < torch.finfo(flat.dtype).tiny).sum() - zeros
    finite = flat.isfinite()
    count = finite.sum()
    wide = torch.where(finite, flat, 0).double()
    largest = wide.abs().amax()
    wide /= torch.where(largest > 0, largest, 1)  # else a square could overflow or vanish
    infinite = torch.tensor(math.inf, dtype=flat.dtype, device=flat.device)
    none = torch.tensor(math.nan, dtype=torch.float64, device=flat.device)
    low = torch.where(count > 0, torch.where(finite, flat, infinite).amin().double(), none)
    high = torch.where(count > 0, torch.where(finite, flat, -infinite).amax().double(), none)
    parts = [
        flat.isnan().sum(),
        flat.isposinf().sum(),
        flat.isneginf().sum(),
        zeros,
        low,
        high,
        wide.sum() / count * largest,
        torch.linalg.vector_norm(wide) * largest,
        subnormal / flat.numel(),
    ]
    return torch.stack([part.to(torch.float64) for part in parts])


def headroom(absmax: float, dtype: torch.dtype) -> float:
    """Bits left before the largest magnitude overflows `dtype`: a countdown, at 0 the next doubling is Inf.

    Args:
        absmax: largest finite magnitude of the tensor; nan where there is none.
        dtype: the dtype in which the tensor lives during training.

    Returns:
        log2(max(dtype)) - log2(absmax); inf for 0; nan for nan and for dtypes that do not overflow to Inf.
    """
    real = dtype.to_real() if dtype.is_complex else dtype
    if not real.is_floating_point or math.isnan(absmax):
        return math.nan
    return math.inf if absmax == 0 else math.log2(torch.finfo(real).max) - math.log2(absmax)
