"""Non-finite values on their way through plain Python or numpy: what went out of torch, and what comes back."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabilitykit.containers import leaves_of
from stabilitykit.diagnose.graph import Leaf, Source
from stabilitykit.measure.summary import bad_rows, summarise
from stabilitykit.measure.values import is_finite
from stabilitykit.schema import TensorSummary


class Numbers:
    """What Python holds that is not finite: what the batch brought in as numbers or arrays, and what was read since."""

    def __init__(self) -> None:
        self._held: list[tuple[Source, bool]] = []  # oldest first, and whether it holds a NaN

    def hand_out(self, source: Source, *, nan: bool) -> None:
        """Python got a non-finite value: `item`, `tolist`, `numpy`, or the batch itself."""
        self._held.append((source, nan))

    def origin_of(self, *, nan: bool) -> tuple[Source, bool] | None:
        """What a NaN, or an Inf, that comes back had most likely been; None where Python made it.

        A NaN was a NaN before, or else came of an Inf; an Inf was one.
        """
        alike = [entry for entry in self._held if entry[1] == nan] or (self._held if nan else [])
        return alike[-1] if alike else None

    def in_batch(self, summary: TensorSummary) -> tuple[Source, bool] | None:
        """The number or array of the batch that an Inf which comes back was: of the same sign."""
        for source, nan in self._held:
            if isinstance(source, Leaf) and source.kind == "batch":
                given = source.summary
                if (given.posinf and summary.posinf) or (given.neginf and summary.neginf):
                    return source, nan
        return None


def bad_numbers(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Python numbers and numpy arrays in a batch that are not finite, with their paths."""
    numbers: list[tuple[str, Any]] = [*leaves_of(value, float), *leaves_of(value, np.floating)]
    for path, number in numbers:
        if not math.isfinite(number):
            yield path, torch.tensor(float(number))
    for path, array in leaves_of(value, np.ndarray):
        if array.dtype.kind in "fc" and not is_finite(tensor := torch.from_numpy(np.array(array))):
            yield path, tensor


def batch_leaf(name: str, tensor: Tensor) -> Leaf:
    """The leaf for a number or array of the batch."""
    return Leaf("batch", name, summarise(tensor, name), bad_rows(tensor))


@contextmanager
def watching_exports(exported: Callable[[Tensor], None]) -> Iterator[None]:
    """Report every tensor that this thread hands to Python as a list or an array: no operations of torch's."""
    methods: Mapping[str, Any] = {name: getattr(Tensor, name) for name in ("numpy", "tolist")}
    replaced = {name: vars(Tensor)[name] for name in methods if name in vars(Tensor)}  # torch has them in a base class
    thread = threading.get_ident()

    def watched(method: Any) -> Any:
        @functools.wraps(method)
        def export(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            handed = method(tensor, *args, **kwargs)
            if threading.get_ident() == thread:
                exported(tensor)
            return handed

        return export

    for name, method in methods.items():
        setattr(Tensor, name, watched(method))
    try:
        yield
    finally:
        for name in methods:
            delattr(Tensor, name)
        for name, method in replaced.items():
            setattr(Tensor, name, method)
