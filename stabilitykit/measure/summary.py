"""One tensor in numbers that can be printed: the evidence in a verdict.  Called by the tracer, off the hot path."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from stabilitykit.measure.values import numbers, shape_of, values
from stabilitykit.schema import TensorSummary

BLOCK = 1 << 22  # values looked at together: what is told of a tensor needs no second one of its size


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
    nan = posinf = neginf = zeros = num_finite = 0
    low, high, total = math.inf, -math.inf, 0.0
    for block in torch.split(plain.reshape(-1), BLOCK):
        nan += int(block.isnan().sum())
        posinf += int(block.isposinf().sum())
        neginf += int(block.isneginf().sum())
        if not brief:
            zeros += int((block == 0).sum())
            finite = block[block.isfinite()].double()
            num_finite += finite.numel()
            total += finite.sum().item()
            if finite.numel():
                low, high = min(low, finite.min().item()), max(high, finite.max().item())
    counted = replace(head, nan=nan, posinf=posinf, neginf=neginf)
    if brief:
        return counted
    if not num_finite:
        low, high, total, num_finite = math.nan, math.nan, math.nan, 1
    return replace(counted, zeros=zeros, min=low, max=high, mean=total / num_finite)


def bad_rows(tensor: Tensor) -> tuple[int, ...]:
    """Indices along the first dimension that hold a NaN or Inf; empty for a scalar."""
    plain = values(tensor)
    if plain is None or tensor.dim() == 0 or tensor.is_nested or tensor.layout != torch.strided:
        return ()
    bad = ~plain.isfinite()
    return tuple(torch.nonzero(bad.flatten(1).any(1) if bad.dim() > 1 else bad).flatten().tolist())
