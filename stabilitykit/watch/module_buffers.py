"""The module buffers a step is supposed to keep finite: BatchNorm's statistics, a moving average."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from stabilitykit.measure.norms import Norms, tensor_norms
from stabilitykit.measure.values import is_finite

_Slot = tuple[str, dict[str, Tensor | None], str]  # qualified name, and where the module keeps the tensor


class ModuleBuffers:
    """Buffers as they are now: code may assign one anew. `refresh` finds those that were registered since."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._persistent = set(model.state_dict(keep_vars=True))
        self.refresh()
        first = {name: norm for name, norm in self.norms().read().items() if not math.isfinite(norm)}
        self._known_bad = set(first)
        self._inf_at_first = {name for name, norm in first.items() if math.isinf(norm)}  # such a one may be reset

    def refresh(self) -> None:
        """Look through the modules again."""
        self._slots: list[_Slot] = [
            (f"{prefix}.{name}" if prefix else name, held, name)
            for prefix, owner in self._model.named_modules()
            for held in [dict(owner._buffers.items()) if isinstance(owner, torch.jit.ScriptModule) else owner._buffers]
            for name in held
        ]

    def norms(self) -> Norms:
        """L2 norms of the floating-point ones."""
        live = self._live()
        return Norms(list(live), tensor_norms(live.values()))

    def newly_bad(self, norms: Norms) -> list[str]:
        """Those that have become non-finite: one that was so from the start is meant to be so."""
        found = norms.bad()
        suspects = found.keys() & self._persistent
        live = self._live() if suspects else {}
        bad = {name for name in suspects if not is_finite(live[name])}
        self._known_bad &= bad
        reset = {name for name in bad & self._inf_at_first if not math.isnan(found[name])}
        return sorted(bad - self._known_bad - reset)

    def accept(self, names: Collection[str]) -> None:
        """Do not report these again until they have been finite once."""
        self._known_bad.update(names)

    def _live(self) -> dict[str, Tensor]:
        return {
            label: entry
            for label, owner, name in self._slots
            if (entry := owner.get(name)) is not None and entry.is_floating_point()
        }
