"""Statistics of many tensors gathered during a step, brought over at once and turned into rows of `tensors`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stabilitykit.measure.statistics import FIELDS, Numbers, headroom, measure, measure_each
from stabilitykit.measure.values import ordinary, shape_of
from stabilitykit.schema import PHASES, ROLES, TENSOR_ROW, Phase, Role

FEW = 1 << 13  # values that are copied and measured with others: one call costs as much as reading them eight times
TOGETHER = 1 << 16  # values measured in one go: with their squares in float64 they lie in the cache
_UNREAD = (0, 0, 0, 0, math.nan, math.nan, math.nan, math.nan, math.nan)
_ROLES = {role: number for number, role in enumerate(ROLES)}
_PHASES = {phase: number for number, phase in enumerate(PHASES)}
_L2 = FIELDS.index("l2")


class Names(Protocol):
    """Whoever hands out tensor ids: the recorder."""

    def tensor_id(self, name: str, *, kind: str = "", dtype: str = "", shape: tuple[int, ...] = ()) -> int:
        """The id of a name, the same at every call."""


class _Key(NamedTuple):
    """What a row says beside its statistics; the same at every step, most often."""

    name: str
    tensor: int
    role: int
    phase: int
    call: int
    micro: int
    numel: int
    dtype: torch.dtype


class _Blank:
    """Rows of which only the statistics are missing."""

    def __init__(self, keys: list[_Key]) -> None:
        self.keys = keys
        self._rows = np.zeros(len(keys), TENSOR_ROW)
        self._rows["order"] = np.arange(len(keys))
        for field in ("tensor", "role", "phase", "call", "micro", "numel"):
            self._rows[field] = [getattr(key, field) for key in keys]
        self._bits = np.array([headroom(1.0, key.dtype) for key in keys])
        self._outputs = np.flatnonzero(self._rows["role"] == _ROLES["output"])

    def filled(self, numbers: NDArray[np.float64]) -> NDArray[np.void]:
        """The rows with these statistics, float64 [rows, 9]."""
        rows = self._rows.copy()
        for column, field in enumerate(FIELDS):
            rows[field] = numbers[:, column]
        rows["unsupported"] = np.isnan(numbers[:, _L2]) & (rows["numel"] > 0)
        with np.errstate(divide="ignore"):  # a tensor of zeros has Inf
            rows["headroom"] = self._bits - np.log2(np.abs(numbers[:, 4:6]).max(1))
        return rows

    def largest(self, numbers: NDArray[np.float64]) -> tuple[str, float]:
        """Name and magnitude of the largest finite module output."""
        magnitudes = np.abs(numbers[self._outputs, 4:6]).max(1)
        most = float(np.fmax.reduce(magnitudes, initial=math.nan))
        return (self.keys[self._outputs[np.argmax(magnitudes == most)]].name if most == most else "", most)


class RowCollector:
    """Collects measurements; `take` and `clear` empty it.

    Attributes:
        largest: name and magnitude of the largest finite module output among the rows last taken.
    """

    def __init__(self, names: Names) -> None:
        self.largest = ("", math.nan)
        self._names = names
        self._ids: dict[tuple[str, str], int] = {}
        self._blank = _Blank([])
        self.clear()

    def add(
        self, name: str, role: Role, phase: Phase, tensor: Tensor, *, kind: str, call: int = 0, micro: int = 0
    ) -> None:
        """Measure `tensor` now, on its device; its values may be gone when the step ends."""
        dtype, numel = tensor.dtype, tensor.numel()
        identity = self._ids.get((name, kind))
        if identity is None:
            label = str(dtype).removeprefix("torch.")
            identity = self._names.tensor_id(name, kind=kind, dtype=label, shape=shape_of(tensor))
            self._ids[name, kind] = identity
        position = len(self._keys)
        if 0 < numel <= FEW and dtype is torch.float32 and tensor.is_cpu and ordinary(tensor) and not tensor.is_neg():
            self._small.append((position, tensor.clone()))
            self._num_small += numel
        elif isinstance(measured := measure(tensor), Tensor):
            self._on_device.append((position, measured))
        elif measured is not None:
            self._on_host.append((position, measured))
        self._keys.append(_Key(name, identity, _ROLES[role], _PHASES[phase], call, micro, numel, dtype))
        if self._num_small > TOGETHER:
            self._measure_small()

    def take(self) -> NDArray[np.void] | None:
        """All rows since the last call, in execution order; None where nothing was measured."""
        if not self._keys:
            return None
        try:
            return self._rows()
        finally:
            self.clear()

    def clear(self) -> None:
        """Let go of what was measured and not taken."""
        self._keys: list[_Key] = []
        self._on_host: list[tuple[int, Numbers]] = []
        self._on_device: list[tuple[int, Tensor]] = []
        self._small: list[tuple[int, Tensor]] = []
        self._num_small = 0
        self._found: list[tuple[Any, Any]] = []  # positions, and [positions, 9]

    def _rows(self) -> NDArray[np.void]:
        self._measure_small()
        if self._on_device:
            positions, packed = zip(*self._on_device, strict=True)
            together = torch.stack([entry.to(packed[0].device) for entry in packed])
            self._found.append((positions, together.cpu().numpy()))
        if self._on_host:
            positions, measured = zip(*self._on_host, strict=True)
            self._found.append((positions, measured))
        numbers = np.tile(_UNREAD, (len(self._keys), 1))
        for positions, found in self._found:
            numbers[list(positions)] = found
        if self._keys != self._blank.keys:
            self._blank = _Blank(self._keys)
        self.largest = self._blank.largest(numbers)
        return self._blank.filled(numbers)

    def _measure_small(self) -> None:
        if self._small:
            positions, tensors = zip(*self._small, strict=True)
            self._found.append((positions, measure_each(tensors)))
            self._small, self._num_small = [], 0
