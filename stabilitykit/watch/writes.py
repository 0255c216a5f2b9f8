"""Norms of the parameters when a step ends, and whether someone wrote to one before the next step used it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from stabilitykit.measure.norms import Norms, fusible, tensor_norms, transfer

SMALL = 1 << 18  # values that may be read again before each step: 40 us
CALL = 1 << 11  # values that are read in the time a tensor costs however small it is, and fewer than it might be
PORTIONS = 16  # of more than that, on the CPU, where memory is slow: one before each step


class ParameterNorms:
    """Compares norms: version counters miss what is written through `.data`, numpy or another process.

    Attributes:
        in_portions: `touched` looks at some of them only, and may miss a write.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._names, self._tensors = list(parameters), list(parameters.values())
        self._fusible = all(fusible(entry) for entry in self._tensors)
        self._pointers: Sequence[int] = ()
        self._after: Sequence[float] = ()  # norms when the last step ended
        portions = _portions(self._tensors)
        self.in_portions = len(portions) > 1
        self._portions = cycle(portions)

    def measure(self) -> Norms:
        """The norms as they are now, in float32 where the parameters are."""
        return Norms(self._names, self._measure(self._tensors))

    def step_ended(self, norms: Iterable[float]) -> None:
        """Keep what `measure` gave when the step was over."""
        self._after = list(norms)

    def touched(self) -> bool:
        """Whether a parameter is not what it was when the last step ended.

        A large model on the CPU is looked at in portions until one was found; what this misses, `written` finds when it
        matters.
        """
        if not self._after:
            return False
        found = self._differing(next(self._portions))
        if found and self.in_portions:  # who writes once may write again
            self.in_portions, self._portions = False, cycle([range(len(self._tensors))])
        return bool(found)

    def written(self) -> Mapping[str, Tensor]:
        """Copies of the parameters that are not what they were when the last step ended, if `touched` may miss some."""
        found = self._differing(range(len(self._tensors))) if self._after and self.in_portions else []
        return {self._names[index]: self._tensors[index].detach().clone() for index in found}

    def _differing(self, indices: Sequence[int]) -> list[int]:
        now = transfer(self._measure([self._tensors[index] for index in indices]))
        return [index for index, norm in zip(indices, now, strict=True) if _differ(norm, self._after[index])]

    def _measure(self, tensors: list[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return torch._foreach_norm(tensors) if tensors and self._are_fusible() else tensor_norms(tensors)

    def _are_fusible(self) -> bool:
        """As when last looked at, while the memory is the same: a change of device or dtype moves it."""
        if self._fusible:
            pointers = [entry.data_ptr() for entry in self._tensors]
            if pointers != self._pointers:
                self._fusible = all(fusible(entry) for entry in self._tensors)
                self._pointers = pointers
        return self._fusible


def _portions(tensors: Sequence[Tensor]) -> Sequence[Sequence[int]]:
    """Indices of `tensors`, all of them or in runs of about equal numbers of values."""
    sizes = [CALL + (0 if is_lazy(entry) else entry.numel()) for entry in tensors]
    if sum(sizes) <= SMALL or any(entry.device.type != "cpu" for entry in tensors):
        return [range(len(tensors))]
    portions: list[list[int]] = [[]]
    filled = 0
    for index, size in enumerate(sizes):
        if filled >= sum(sizes) / PORTIONS:
            portions.append([])
            filled = 0
        portions[-1].append(index)
        filled += size
    return portions


def _differ(a: float, b: float) -> bool:
    return a != b and not (math.isnan(a) and math.isnan(b))
