"""Integers computed from values that were not finite: a NaN that became an index is what an index error is about."""

from __future__ import annotations

from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef

from stabilitykit.diagnose.arguments import Call, is_integer
from stabilitykit.diagnose.graph import Source
from stabilitykit.diagnose.labels import storage_key


class Integers:
    """Integer memory and the non-finite value behind it.  The weak reference keeps an address from being reused."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, Source]] = {}

    def follow(self, call: Call, result: Any, source: Source | None) -> None:
        """Note the integers that a call made of a non-finite value, or of such integers."""
        source = source or self.behind(call)
        if source is None:
            return
        for tensor in call.integers(result):
            key = storage_key(tensor)
            if key is not None:
                reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                self._known[key] = (reference, source)

    def behind(self, call: Call) -> Source | None:
        """The non-finite value behind an integer that a call was given."""
        if not self._known:
            return None
        keys = (storage_key(tensor) for _, tensor in call.inputs if is_integer(tensor))
        return next((self._known[key][1] for key in keys if key in self._known), None)
