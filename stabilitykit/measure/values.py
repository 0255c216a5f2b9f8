"""The plain real numbers behind any kind of tensor: what every statistic starts from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

EXACT = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # dtypes in which aminmax and isfinite work
_ORDINARY = (Tensor, torch.nn.Parameter)


def values(tensor: Tensor) -> Tensor | None:
    """The stored numbers of `tensor` as a real, dense, detached tensor; a view where that is possible.

    Sparse tensors give their stored values (an embedding's gradient holds several for a row: their sum), complex ones
    both parts (a last dimension of 2), float8 is widened to float32, DTensors give the local shard (no collective is
    ever issued).

    Returns:
        None where there is nothing that could be non-finite or nothing to read: integers, bools, meta and fake tensors,
        and forward-mode autograd's zeros, which have no memory.
    """
    if ordinary(tensor):
        return None if tensor._is_zerotensor() else tensor.detach().resolve_neg()  # noqa: SLF001 - no public name
    if not (tensor.is_floating_point() or tensor.is_complex()) or not _has_values(tensor):
        return None
    plain = tensor.detach()
    if hasattr(plain, "to_local"):
        plain = plain.to_local()
    if plain.is_nested or plain.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
        plain = plain.values()
    elif plain.layout == torch.sparse_coo:
        plain = _coalesced(plain)._values()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj())
    if plain.layout != torch.strided or plain.is_quantized:
        return None
    if plain.is_neg():
        plain = plain.resolve_neg()
    try:
        return plain if plain.dtype in EXACT else plain.float()
    except NotImplementedError:  # a storage-only dtype
        return None


def _coalesced(tensor: Tensor) -> Tensor:
    try:
        return tensor if tensor.is_coalesced() else tensor.coalesce()
    except RuntimeError:  # no kernel for the dtype
        return tensor


def numbers(tensor: Tensor) -> Tensor | None:
    """What `values` gives, and integers as they are: they cannot be non-finite, but a divisor may be 0."""
    integers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized)
    if integers and tensor.dtype != torch.bool and tensor.layout is torch.strided and _has_values(tensor):
        return tensor.detach() if not tensor.is_nested else None
    return values(tensor)


def ordinary(tensor: Tensor) -> bool:
    """Whether kernels take the tensor as it is: no subclass, dense, real, of an ordinary floating dtype."""
    return (
        type(tensor) in _ORDINARY
        and tensor.dtype in EXACT
        and tensor.layout is torch.strided
        and not (tensor.is_meta or tensor.is_nested)
    )


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape; of a nested tensor, whose rows differ, the number of rows."""
    return (tensor.size(0),) if tensor.is_nested else tuple(tensor.shape)


def _has_values(tensor: Tensor) -> bool:
    """Whether there is memory to read: not so for meta and fake tensors, and parameters that are yet to be made."""
    return not (tensor.device.type == "meta" or isinstance(tensor, FakeTensor) or is_lazy(tensor))


def is_finite(tensor: Tensor) -> bool:
    """Whether no stored value is NaN or Inf: exact, one pass at memory speed, one transfer.

    `aminmax` carries NaN through and is 20 to 40 times faster on CPU than `isfinite().all()`.
    """
    plain = values(tensor)
    if plain is None or plain.numel() == 0:
        return True
    low, high = torch.aminmax(plain)
    return bool((high - low).isfinite()) or bool(low.isfinite() & high.isfinite())


def make_finite(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Put moderate numbers where tensors are not finite; a -Inf stays far below what a mask is compared with.

    Returns:
        The tensors that could not be mended: of a dtype without such kernels.
    """
    left = []
    for tensor in tensors:
        try:
            tensor.nan_to_num_(nan=1.0, posinf=1.0, neginf=-1e4)
        except (RuntimeError, NotImplementedError):
            left.append(tensor)
    return left
