"""Rows for parameters, their gradients before and after clipping, their updates, optimizer state and module buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from stabilitykit.config import MonitorConfig
from stabilitykit.measure.norms import combine, tensor_norms, transfer
from stabilitykit.measure.values import ordinary
from stabilitykit.schema import Phase, Role
from stabilitykit.snapshot import merge
from stabilitykit.watch.gradients import versions_of
from stabilitykit.watch.rows import RowCollector


class ParameterWatch:
    """Called at the ends of backward, at the optimizer's start and at the step's end, on recorded steps only."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        parameters: Mapping[str, Tensor],
        rows: RowCollector,
        config: MonitorConfig,
    ) -> None:
        self._model, self._optimizers, self._parameters = model, optimizers, parameters
        self._rows, self._config = rows, config
        self._before: Mapping[str, Tensor] = {}
        # Kept while step after step is recorded: fresh memory costs three times.
        self._copies: Mapping[str, Tensor] = {}
        self._measured = versions_of(())

    def begin(self, *, recording: bool, before: Mapping[str, Tensor] | None = None) -> None:
        """A step starts; `before`: copies of the parameters as it finds them, if someone holds them."""
        self.ended()
        if before or not recording:
            self._copies = {}
        self._before = before or {}

    def ended(self) -> None:
        """A step is over, whether it came to its end or not."""
        self._before = {}
        self._measured = versions_of(())

    def backward_ended(self, micro: int) -> None:
        """Measure the gradients as backward left them."""
        if self._config.gradients:
            self._gradients("gradient", "backward", micro)
            self._measured = self._gradient_versions()

    def optimizer_starts(self, micro: int) -> None:
        """Measure the gradients again where something has changed them, and hold the parameters for the update."""
        if self._config.gradients and self._gradient_versions() != self._measured:
            self._gradients("gradient_clipped", "clip", micro)
        if not self._before:
            live = {name: entry.detach() for name, entry in self._parameters.items() if not is_lazy(entry)}
            self._before = self._copies = merge(self._copies, live)

    def step_ended(self, micro: int) -> float:
        """Measure parameters, updates, optimizer state and module buffers; the L2 norm of the whole update."""
        norms: list[Tensor] = []
        for name, entry in self._parameters.items():  # each with its update, while it lies in the cache
            if self._config.parameters:
                self._add("parameter", "optimizer", name, entry, "parameter", micro)
            update = self._update(name, entry)
            if update is not None:
                if self._config.parameters:
                    self._add("update", "optimizer", name, update, "parameter", micro)
                norms += tensor_norms([update])
        if self._config.optimizer_state:
            for name, entry in self._optimizer_state():
                self._add("optimizer_state", "optimizer", name, entry, "optimizer_state", micro)
        if self._config.module_buffers:
            for name, entry in self._model.named_buffers():
                if entry.is_floating_point():
                    self._add("module_buffer", "state", name, entry, "module_buffer", micro)
        return combine(transfer(norms)) if norms else math.nan

    def _update(self, name: str, parameter: Tensor) -> Tensor | None:
        """What the optimizers added, in the memory of our copy where there is one; None where it cannot be told."""
        before, after = self._before.get(name), parameter.detach()
        if before is None or not before.is_floating_point() or before.layout != after.layout:
            return None
        ours = self._before is self._copies and ordinary(before)
        return torch.sub(after, before, out=before) if ours else after - before

    def _gradients(self, role: Role, phase: Phase, micro: int) -> None:
        for name, entry in self._parameters.items():
            if entry.grad is not None:
                self._add(role, phase, name, entry.grad, "parameter", micro)

    def _gradient_versions(self) -> tuple[list[int], list[int]]:
        return versions_of([grad for entry in self._parameters.values() if (grad := entry.grad) is not None])

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        names = {id(entry): name for name, entry in self._parameters.items()}
        for optimizer in self._optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.dim() > 0:
                        yield f"{names.get(id(parameter), 'parameter')}.{key}", value

    def _add(self, role: Role, phase: Phase, name: str, tensor: Tensor, kind: str, micro: int) -> None:
        if not is_lazy(tensor):
            self._rows.add(name, role, phase, tensor, kind=kind, micro=micro)


def named_parameters(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The model's parameters by name, then those the optimizers hold beside it."""
    named: dict[str, Tensor] = dict(model.named_parameters())
    known = {id(entry) for entry in named.values()}
    for which, optimizer in enumerate(optimizers):
        for group_index, group in enumerate(optimizer.param_groups):
            for position, entry in enumerate(group["params"]):
                if id(entry) not in known:
                    named[f"optimizer{which or ''}.group{group_index}[{position}]"] = entry
                    known.add(id(entry))
    return named


def outline(parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> tuple[list[int], int]:
    """Changes when an optimizer holds other parameters than it did, or a lazy one gets its shape.

    While the watched `parameters` are held, none of their identities is given to another.
    """
    held = [id(entry) for optimizer in optimizers for group in optimizer.param_groups for entry in group["params"]]
    return held, sum(map(is_lazy, parameters.values()))
