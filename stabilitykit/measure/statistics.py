"""The statistics of one recorded tensor, packed for one transfer a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabilitykit.measure.values import values

SQUARES_FIT = 1e30  # a sum of squares below this is far from float32's overflow
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
    if flat.device.type == "cpu":
        low, high = (bound.item() for bound in torch.aminmax(flat))
        if math.isfinite(low) and math.isfinite(high):
            return torch.tensor(_of_finite(flat, low, high), dtype=torch.float64)
    return _with_nonfinite(flat)


def _of_finite(flat: Tensor, low: float, high: float) -> tuple[float, ...]:
    """On the CPU a number costs nothing to look at, and most tensors are finite: five passes instead of twelve."""
    zeros = flat.numel() - int(torch.count_nonzero(flat))
    tiny = torch.finfo(flat.dtype).tiny
    magnitudes = flat.abs()
    some = zeros > 0 or magnitudes.amin().item() < tiny
    subnormal = int(torch.count_nonzero(magnitudes < tiny)) - zeros if some else 0
    wide = flat.dtype not in (torch.float32, torch.float64) or max(-low, high) > (SQUARES_FIT / flat.numel()) ** 0.5
    dtype = torch.float64 if wide else flat.dtype
    mean, l2 = flat.mean(dtype=dtype).item(), torch.linalg.vector_norm(flat, dtype=dtype).item()
    return 0, 0, 0, zeros, low, high, mean, l2, subnormal / flat.numel()


def _with_nonfinite(flat: Tensor) -> Tensor:
    zeros = flat.numel() - torch.count_nonzero(flat)
    subnormal = (flat.abs() < torch.finfo(flat.dtype).tiny).sum() - zeros
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
