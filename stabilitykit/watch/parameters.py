"""Rows for parameters, their gradients before and after clipping, their updates, optimizer state and module buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from stabilitykit.config import MonitorConfig
from stabilitykit.measure.norms import combine, tensor_norms, transfer
from stabilitykit.schema import Phase, Role
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
        self._before: dict[str, Tensor] = {}
        self._measured: tuple[int, ...] = ()

    def begin(self, before: Mapping[str, Tensor] | None = None) -> None:
        """A step starts, or is over; `before`: copies of the parameters as it finds them, if someone holds them."""
        self._before = dict(before or {})
        self._measured = ()

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
            known = {name: entry for name, entry in self._parameters.items() if not is_lazy(entry)}
            self._before = {name: entry.detach().clone() for name, entry in known.items()}

    def step_ended(self, micro: int) -> float:
        """Measure parameters, updates, optimizer state and module buffers; the L2 norm of the whole update."""
        if self._config.parameters:
            self._add("parameter", "optimizer", self._parameters, "parameter", micro)
        norm = self._updates(micro)
        if self._config.optimizer_state:
            self._add("optimizer_state", "optimizer", self._optimizer_state(), "optimizer_state", micro)
        if self._config.module_buffers:
            buffers = {name: entry for name, entry in self._model.named_buffers() if entry.is_floating_point()}
            self._add("module_buffer", "state", buffers, "module_buffer", micro)
        return norm

    def _updates(self, micro: int) -> float:
        """Measure what the optimizers added, one parameter after another: all of it would be a copy of the model."""
        norms: list[Tensor] = []
        for name in list(self._before):
            before, after = self._before.pop(name), self._parameters[name].detach()
            if before.is_floating_point() and before.layout == after.layout:
                update = after - before
                norms += tensor_norms([update])
                if self._config.parameters:
                    self._add("update", "optimizer", {name: update}, "parameter", micro)
        return combine(transfer(norms)) if norms else math.nan

    def _gradients(self, role: Role, phase: Phase, micro: int) -> None:
        held = {name: entry.grad for name, entry in self._parameters.items() if entry.grad is not None}
        self._add(role, phase, held, "parameter", micro)

    def _gradient_versions(self) -> tuple[int, ...]:
        return tuple(entry.grad._version for entry in self._parameters.values() if entry.grad is not None)

    def _optimizer_state(self) -> dict[str, Tensor]:
        names = {id(entry): name for name, entry in self._parameters.items()}
        return {
            f"{names.get(id(parameter), 'parameter')}.{key}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim() > 0
        }

    def _add(self, role: Role, phase: Phase, tensors: Mapping[str, Tensor], kind: str, micro: int) -> None:
        for name, tensor in tensors.items():
            if is_lazy(tensor):
                continue
            self._rows.add(name, role, phase, tensor.detach(), kind=kind, micro=micro)


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


def outline(parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> tuple[int, int]:
    """Changes when parameters join an optimizer, are frozen or thawed, or a lazy one gets its shape."""
    optimised = sum(len(group["params"]) for optimizer in optimizers for group in optimizer.param_groups)
    return optimised, sum(entry.requires_grad + 2 * is_lazy(entry) for entry in parameters.values())
