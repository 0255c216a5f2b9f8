"""The statistics of one recorded tensor, packed for one transfer a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabilitykit.measure.values import values

FIELDS = ("nan", "posinf", "neginf", "zeros", "min", "max", "mean", "l2", "subnormal")


def statistics(tensor: Tensor) -> Tensor | None:
    """Counts of NaN, +Inf, -Inf and zeros; min, max, mean and L2 norm over the finite values; share of subnormals.

    Everything is accumulated in float64, so that half precision cannot overflow and float32 cannot lose the sum.

    Returns:
        float64 [9], in the order of `FIELDS`, on the tensor's device; None where `tensor` is no real or complex
        floating tensor with values to read (see `measure.values`), or is empty.
    """
    plain = values(tensor)
    if plain is None or plain.numel() == 0:
        return None
    flat = plain.reshape(-1)
    tiny = torch.finfo(flat.dtype).tiny
    low, high = torch.aminmax(flat)
    zeros = flat.numel() - torch.count_nonzero(flat)
    subnormal = (flat.abs() < tiny).sum() - zeros
    if flat.device.type == "cpu" and math.isfinite(low.item()) and math.isfinite(high.item()):
        none = torch.zeros((), dtype=torch.float64)
        mean, l2 = _moments(flat, max(abs(low.item()), abs(high.item())))
        parts = [none, none, none, zeros, low, high, mean, l2, subnormal / flat.numel()]
        return torch.stack([part.to(torch.float64) for part in parts])
    return _with_nonfinite(flat, zeros, subnormal)


def _moments(flat: Tensor, absmax: float) -> tuple[Tensor, Tensor]:
    """Mean and L2 norm of finite values; in their own dtype where the square cannot overflow, else in float64."""
    if flat.dtype in (torch.float32, torch.float64) and absmax * absmax * flat.numel() < 1e30:
        return flat.mean(), torch.linalg.vector_norm(flat)
    return flat.mean(dtype=torch.float64), torch.linalg.vector_norm(flat, dtype=torch.float64)


def _with_nonfinite(flat: Tensor, zeros: Tensor, subnormal: Tensor) -> Tensor:
    finite = flat.isfinite()
    count = finite.sum()
    wide = torch.where(finite, flat, 0).double()
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
        wide.sum() / count,
        torch.linalg.vector_norm(wide),
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
