"""One tensor in numbers that can be printed: the evidence in a verdict.  Called by the tracer, off the hot path."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from stabilitykit.measure.values import numbers, shape_of, values
from stabilitykit.schema import TensorSummary


def summarise(tensor: Tensor, name: str, *, brief: bool = False) -> TensorSummary:
    """Counts of NaN, Inf and zeros, and range and mean of the finite values, in float64.

    Args:
        tensor: any kind, any dtype; one that nothing can be read of gives name, dtype and shape alone.
        name: how the verdict calls it.
        brief: count what is not finite, and leave it at that.
    """
    plain = numbers(tensor)
    dtype = str(tensor.dtype).removeprefix("torch.")
    head = TensorSummary(name=name, dtype=dtype, shape=shape_of(tensor), numel=tensor.numel())
    if plain is None or plain.numel() == 0:
        return head
    counted = replace(
        head,
        nan=int(plain.isnan().sum()),
        posinf=int(plain.isposinf().sum()),
        neginf=int(plain.isneginf().sum()),
    )
    if brief:
        return counted
    finite = plain[plain.isfinite()].double()
    low, high = (finite.min().item(), finite.max().item()) if finite.numel() else (math.nan, math.nan)
    return replace(
        counted,
        zeros=int((plain == 0).sum()),
        min=low,
        max=high,
        mean=finite.mean().item() if finite.numel() else math.nan,
    )


def bad_rows(tensor: Tensor) -> tuple[int, ...]:
    """Indices along the first dimension that hold a NaN or Inf; empty for a scalar."""
    plain = values(tensor)
    if plain is None or tensor.dim() == 0 or tensor.is_nested or tensor.layout != torch.strided:
        return ()
    bad = ~plain.isfinite()
    return tuple(torch.nonzero(bad.flatten(1).any(1) if bad.dim() > 1 else bad).flatten().tolist())
