"""The statistics of one recorded tensor, packed for one transfer a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.measure.values import EXACT, values

BLOCK = 1 << 17  # values looked at while they lie in the cache
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


def measure_each(tensors: Sequence[Tensor]) -> NDArray[np.float64]:
    """As `measure`, for many small tensors in the calls that one of them would take.

    Args:
        tensors: at least one; each float32 on the host, dense, not empty.

    Returns:
        float64 [tensors, 9], in the order of `FIELDS`.
    """
    together = torch.cat([entry.flatten() for entry in tensors]).detach().numpy()
    sizes = np.array([entry.numel() for entry in tensors])
    starts = np.cumsum(sizes) - sizes
    found = np.zeros((len(tensors), len(FIELDS)))
    with np.errstate(invalid="ignore"):  # NaN, Inf - Inf: such tensors are measured anew
        low, high = np.minimum.reduceat(together, starts), np.maximum.reduceat(together, starts)
        wide = together.astype(np.float64)
        found[:, 4], found[:, 5], found[:, 6] = low, high, np.add.reduceat(wide, starts) / sizes
        wide *= wide  # no square of a float32 overflows or vanishes in float64
        found[:, 7] = np.sqrt(np.add.reduceat(wide, starts))
    near = np.abs(together) < np.finfo(np.float32).tiny
    if near.any():
        found[:, 3] = np.add.reduceat(together == 0, starts, dtype=np.int64)
        found[:, 8] = (np.add.reduceat(near, starts, dtype=np.int64) - found[:, 3]) / sizes
    for index in np.flatnonzero(~(np.isfinite(low) & np.isfinite(high))).tolist():
        found[index] = _with_nonfinite(tensors[index].detach().flatten()).numpy()
    return found


def _on_host(flat: Tensor) -> Numbers | None:
    """The statistics of a finite tensor, memory read once; None where a value is not finite.

    On the CPU numpy compares, counts and bounds up to ten times faster than torch does, at a third of the call.
    """
    near, size = _NEAR_ZERO[flat.dtype], flat.numel()
    low, high, mean, l2, zeros, small = math.inf, -math.inf, 0.0, 0.0, 0, 0
    for block in (flat,) if size <= BLOCK else torch.split(flat, BLOCK):
        wide = block if block.dtype in (torch.float32, torch.float64) else block.float()
        part = wide.numpy()
        least, most = float(np.minimum.reduce(part)), float(np.maximum.reduce(part))
        if not (math.isfinite(least) and math.isfinite(most)):
            return None
        low, high = min(low, least), max(high, most)
        if near.may_hold(part, least, most):
            small += int(np.count_nonzero(part < near.bound) - np.count_nonzero(part <= -near.bound))
            zeros += int(np.count_nonzero(part == 0))
        block_mean, block_l2 = _sums(wide, part, max(-least, most))
        mean += block_mean * (len(part) / size)
        l2 = math.hypot(l2, block_l2)
    return 0, 0, 0, zeros, low, high, mean, l2, (small - zeros) / size


class _NearZero:
    """Tells whether a block holds zeros or subnormals.

    Bit patterns read as integers grow with the magnitude: the least unsigned one is the least positive value, the least
    signed one the negative value nearest to zero. Two reductions, where comparisons would write as well.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: of the tensor; half precision is looked at in float32."""
        self.bound = torch.finfo(dtype).tiny
        read_as = torch.tensor(self.bound, dtype=dtype if dtype is torch.float64 else torch.float32).numpy()
        self._unsigned = np.dtype(f"u{read_as.itemsize}")
        self._signed = np.dtype(f"i{read_as.itemsize}")
        self._positive = int(read_as.view(self._signed))
        self._negative = int(np.iinfo(self._signed).min) + self._positive

    def may_hold(self, part: NDArray[Any], least: float, most: float) -> bool:
        """Whether a magnitude lies below the bound; where all values have one sign, their range nearly tells."""
        if least >= self.bound or most <= -self.bound:
            return False
        if least > -self.bound or np.minimum.reduce(part.view(self._unsigned)) < self._positive:
            return True
        return bool(np.minimum.reduce(part.view(self._signed)) < self._negative)


_NEAR_ZERO = {dtype: _NearZero(dtype) for dtype in EXACT}


def _sums(block: Tensor, part: NDArray[Any], largest: float) -> tuple[float, float]:
    """The mean and the L2 norm; `largest` is the largest magnitude, by which squares that do not fit are scaled."""
    if SQUARES_FIT[0] < largest * largest < SQUARES_FIT[1] / len(part):
        return block.sum().item() / len(part), math.sqrt(part.dot(part))
    if not largest:
        return 0.0, 0.0
    scaled = block.double() / largest
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
    try:
        largest = torch.finfo(real).max
    except NotImplementedError:  # a storage-only dtype
        return math.nan
    return math.inf if absmax == 0 else math.log2(largest) - math.log2(absmax)
