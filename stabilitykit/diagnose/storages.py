"""Which operation or tensor made the non-finite values in a piece of memory, element by element where several did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from stabilitykit.diagnose.graph import Operation, Source
from stabilitykit.diagnose.labels import Labels, storage_key
from stabilitykit.measure.values import is_finite, values

_MOST = 256  # writes of one storage that are told apart; a longer loop's later ones count as the first


@dataclass(frozen=True, slots=True)
class Region:
    """The elements of a storage that a view stands for."""

    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, view: Tensor) -> Region:
        """The region of a strided tensor."""
        return cls(view.dtype, tuple(view.shape), tuple(view.stride()), int(view.storage_offset()))

    @property
    def span(self) -> tuple[int, int]:
        """First byte and the one after the last."""
        reach = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        width = self.dtype.itemsize
        return self.offset * width, (self.offset + reach + 1) * width

    def may_meet(self, other: Region) -> bool:
        """Whether the two can share an element."""
        (start, end), (first, last) = self.span, other.span
        return start < last and first < end

    def mark(self, marks: Tensor) -> None:
        """Set the region's elements in `marks`, one for each element of the storage, whose dtype is this one's."""
        once = [1 if step == 0 else size for size, step in zip(self.size, self.stride, strict=True)]
        marks.as_strided(once, self.stride, self.offset).fill_(True)


@dataclass(frozen=True, slots=True)
class Write:
    """Something non-finite that was written; `region` is None where it filled the storage."""

    source: Source
    region: Region | None = None


@dataclass(slots=True, eq=False)
class Storage:
    """What is known of one storage.  The weak reference keeps its address from being given to another.

    Attributes:
        writes: what made its non-finite values, oldest first; empty where all is finite.
        gradient: it is a parameter's gradient, or was computed from one after backward.
    """

    reference: StorageWeakRef
    writes: list[Write] = field(default_factory=list)
    gradient: bool = False


class Storages:
    """All memory that a traced step has met, and that still exists."""

    def __init__(self, labels: Labels) -> None:
        self._labels = labels
        self._known: dict[int, Storage] = {}

    def of(self, tensor: Tensor) -> Storage | None:
        """What is known of the tensor's storage, looking at it when it is first met; None where it has none."""
        key = storage_key(tensor)
        if key is None:
            return None
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Storage(_reference(tensor), gradient=self._labels.kind(tensor) == "gradient")
            whole = _whole(tensor)
            if not is_finite(whole):
                known.writes = [Write(self._labels.leaf(key, whole))]
        return known

    def known(self, tensor: Tensor) -> Storage | None:
        """What is known of the tensor's storage, None where it has not been met."""
        key = storage_key(tensor)
        return self._known.get(key) if key is not None else None

    def wrote(self, tensor: Tensor, operation: Operation | None, *, gradient: bool) -> None:
        """Note what a tensor was written by if it is not finite now, and whether it was computed from gradients."""
        key = storage_key(tensor)
        if key is None:
            return
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = Storage(_reference(tensor))
        if _covers_storage(tensor):
            known.writes = [Write(operation)] if operation is not None else []
        elif operation is not None:
            region = Region.of(tensor)
            known.writes = [write for write in known.writes if write.region != region]
            if len(known.writes) < _MOST:
                known.writes.append(Write(operation, region))
        elif known.writes and is_finite(_whole(tensor)):
            known.writes = []
        known.gradient = known.gradient or gradient

    def sources(self, tensor: Tensor) -> Sequence[tuple[Source, bool]]:
        """What last wrote each of a tensor's non-finite elements, and whether it left NaN in one of them."""
        known = self.of(tensor)
        if known is None or not known.writes or is_finite(tensor):
            return ()
        held = known.writes
        if len(held) > 1 and tensor.layout == torch.strided:
            region = Region.of(tensor)
            held = [write for write in held if write.region is None or write.region.may_meet(region)]
        if len(held) > 1 and (told := _tell_apart(tensor, held)):
            return told
        return [(write.source, has_nan(tensor)) for write in held or known.writes[:1]]


def has_nan(tensor: Tensor) -> bool:
    """Whether there is a NaN, in a tensor of any kind."""
    plain = values(tensor)
    return plain is not None and bool(plain.isnan().any())


def _tell_apart(tensor: Tensor, writes: Sequence[Write]) -> Sequence[tuple[Source, bool]]:
    """The newest write to each non-finite element; nothing where the views are too different to compare."""
    if any(write.region is not None and write.region.dtype != tensor.dtype for write in writes):
        return ()
    try:
        flat = _flat(tensor)
        unclaimed = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
        Region.of(tensor).mark(unclaimed)
        unclaimed &= ~flat.isfinite()
        found = []
        for write in reversed(writes):
            mine = torch.zeros_like(unclaimed)
            (write.region or Region(flat.dtype, (flat.numel(),), (1,), 0)).mark(mine)
            mine &= unclaimed
            if bool(mine.any()):
                found.append((write.source, bool(flat[mine].isnan().any())))
                unclaimed &= ~mine
    except RuntimeError:  # a view that overlaps itself, a dtype without these kernels
        return ()
    return found[::-1]


def _reference(tensor: Tensor) -> StorageWeakRef:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout != torch.strided:
        tensor = tensor.values()
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _whole(tensor: Tensor) -> Tensor:
    """All of the storage behind a view, in the view's dtype."""
    if tensor.layout != torch.strided or _covers_storage(tensor) or tensor.is_quantized:
        return tensor
    if tensor.untyped_storage().nbytes() % tensor.element_size():
        return tensor
    return _flat(tensor)


def _flat(tensor: Tensor) -> Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def _covers_storage(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.nbytes == tensor.untyped_storage().nbytes()
