"""Statistics of many tensors gathered during a step, brought over at once and turned into rows of `tensors`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from stabilitykit.measure.statistics import Numbers, headroom, measure
from stabilitykit.measure.values import shape_of
from stabilitykit.schema import PHASES, ROLES, TENSOR_ROW, Phase, Role


class Names(Protocol):
    """Whoever hands out tensor ids: the recorder."""

    def tensor_id(self, name: str, *, kind: str = "", dtype: str = "", shape: tuple[int, ...] = ()) -> int:
        """The id of a name, the same at every call."""


@dataclass(frozen=True, slots=True)
class _Pending:
    name: str
    tensor: int
    role: int
    phase: int
    call: int
    micro: int
    numel: int
    dtype: torch.dtype
    packed: Tensor | Numbers | None


class RowCollector:
    """Collects measurements; `take` empties it.

    Attributes:
        largest: name and magnitude of the largest finite module output among the rows last taken.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._pending: list[_Pending] = []
        self.largest = ("", math.nan)

    def add(
        self, name: str, role: Role, phase: Phase, tensor: Tensor, *, kind: str, call: int = 0, micro: int = 0
    ) -> None:
        """Measure `tensor` now, on its device; its values may be gone when the step ends."""
        with torch.no_grad():
            packed = measure(tensor)
        dtype = str(tensor.dtype).removeprefix("torch.")
        identity = self._names.tensor_id(name, kind=kind, dtype=dtype, shape=shape_of(tensor))
        self._pending.append(
            _Pending(
                name,
                identity,
                ROLES.index(role),
                PHASES.index(phase),
                call,
                micro,
                tensor.numel(),
                tensor.dtype,
                packed,
            )
        )

    def take(self) -> np.ndarray[Any, np.dtype[np.void]] | None:
        """All rows since the last call, in execution order; None where nothing was measured."""
        pending, self._pending = self._pending, []
        if not pending:
            return None
        packed = [entry.packed for entry in pending if isinstance(entry.packed, Tensor)]
        received = iter(torch.stack([entry.to(packed[0].device) for entry in packed]).tolist() if packed else [])
        rows = np.zeros(len(pending), TENSOR_ROW)
        for order, entry in enumerate(pending):
            rows[order] = _row(order, entry, next(received) if isinstance(entry.packed, Tensor) else entry.packed)
        self.largest = _largest(pending, rows)
        return rows


def _largest(pending: list[_Pending], rows: np.ndarray[Any, np.dtype[np.void]]) -> tuple[str, float]:
    outputs = rows["role"] == ROLES.index("output")
    magnitudes = np.where(outputs, np.fmax(np.abs(rows["min"]), np.abs(rows["max"])), np.nan)
    if np.isnan(magnitudes).all():
        return "", math.nan
    position = int(np.nanargmax(magnitudes))
    return pending[position].name, float(magnitudes[position])


def _row(order: int, entry: _Pending, measured: Sequence[float] | None) -> tuple[float, ...]:
    keys = (entry.micro, order, entry.call, entry.tensor, entry.role, entry.phase, entry.numel)
    if measured is None:
        return (*keys, 0, 0, 0, 0, math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, entry.numel > 0)
    nan, posinf, neginf, zeros, low, high, mean, l2, subnormal = measured
    bits = headroom(max(abs(low), abs(high)), entry.dtype)
    return (*keys, nan, posinf, neginf, zeros, low, high, mean, l2, bits, subnormal, 0)
