"""Names for the memory that exists before a step: parameters, module buffers, the batch, the replay buffer."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from stabilitykit.diagnose.graph import Leaf, LeafKind
from stabilitykit.measure.summary import bad_rows, summarise
from stabilitykit.measure.values import is_finite


class Labels:
    """Tensors by the memory they occupy; several may share a storage (parameters that are views of one flat tensor).

    Attributes:
        batch_size: length of the first batch entry with a dimension.
    """

    def __init__(self) -> None:
        self.batch_size: int | None = None
        self._known: defaultdict[int, list[tuple[LeafKind, str, Tensor]]] = defaultdict(list)

    def add(self, kind: LeafKind, name: str, tensor: Tensor) -> None:
        """Give a tensor's memory a name; where two name the same, the first wins."""
        key = storage_key(tensor)
        if key is not None:
            self._known[key].append((kind, name, tensor))
        if kind == "batch" and self.batch_size is None and tensor.dim() > 0:
            self.batch_size = len(tensor)

    def kind(self, tensor: Tensor) -> LeafKind | None:
        """The kind of what `tensor` is, or is a view of; None for one made during the step."""
        found = self._of(tensor)
        return found[0] if found is not None else None

    def name(self, tensor: Tensor) -> str:
        """The name of what `tensor` is, or is a view of; empty for one made during the step."""
        found = self._of(tensor)
        return found[1] if found is not None else ""

    def leaf(self, key: int, whole: Tensor) -> Leaf:
        """The leaf for a non-finite storage that no operation made: the first of its tensors that is not finite."""
        held = self._known.get(key, ())
        bad = next((entry for entry in held if not is_finite(entry[2])), None)
        kind, name, tensor = bad or ("unknown", "", whole)
        return Leaf(kind, name, summarise(tensor, name or "a tensor from outside the step"), bad_rows(tensor))

    def _of(self, tensor: Tensor) -> tuple[LeafKind, str, Tensor] | None:
        key = storage_key(tensor)
        held = self._known.get(key, ()) if key is not None else ()
        return next((entry for entry in held if len(held) == 1 or _overlap(entry[2], tensor)), None)


def storage_key(tensor: Tensor) -> int | None:
    """The identity of the memory behind a tensor, None where it has none."""
    try:
        if tensor.layout == torch.sparse_coo:
            tensor = tensor._values()
        elif tensor.layout != torch.strided:
            tensor = tensor.values()
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage share elements, taken as the ranges they span."""
    if one.layout != torch.strided or other.layout != torch.strided:
        return True
    (start, end), (first, last) = _span(one), _span(other)
    return start < last and first < end


def _span(tensor: Tensor) -> tuple[int, int]:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset())
    return int(start), int(start + reach + 1 if tensor.numel() else start)
