"""L2 norms of many tensors at once, without a transfer and without overflow in the combination."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from stabilitykit.measure.values import is_plain, values


def tensor_norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """One 0-d tensor each, the L2 norm in the tensor's own dtype; NaN and Inf carry through.

    The norm of finite float32 values above 1e19 overflows to Inf: an Inf here is a suspicion, `is_finite` the proof.
    """
    plain = [_readable(entry) for entry in tensors]
    return list(torch._foreach_norm(plain)) if plain else []


def transfer(scalars: Sequence[Tensor]) -> list[float]:
    """Bring 0-d tensors to the host in one transfer a device."""
    if not scalars:
        return []
    device = scalars[0].device
    if all(entry.dtype == torch.float32 and entry.device == device for entry in scalars):  # nine in ten
        return torch.stack(list(scalars)).tolist()
    return torch.stack([entry.to(device=device, dtype=torch.float64) for entry in scalars]).tolist()


def combine(norms: Iterable[float]) -> float:
    """The L2 norm of the whole from those of its parts; `math.hypot` scales: only the result can overflow."""
    return math.hypot(*norms)


def _readable(tensor: Tensor) -> Tensor:
    """The tensor itself where the kernel takes it; its stored values otherwise, nothing where there are none."""
    if type(tensor) in (Tensor, torch.nn.Parameter) and is_plain(tensor):
        return tensor.detach()
    plain = values(tensor)
    return torch.empty(0) if plain is None else plain
