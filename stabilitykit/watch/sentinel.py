"""The check of every step: loss, gradients before and after clipping, parameters, module buffers; one transfer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from stabilitykit.measure.norms import combine, tensor_norms, transfer
from stabilitykit.measure.values import is_finite


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the sentinel saw in one step.  The lists name what is not finite, or looks it."""

    losses: Mapping[str, float]
    grad_norm: float = math.nan  # L2 when the last backward ended, as it was: scaled where a scaler scales
    grad_norm_clipped: float = math.nan
    parameter_norm: float = math.nan
    num_backwards: int = 0
    stepped: bool = False
    changed_gradients: bool = False  # between the end of backward and the optimizer
    bad_losses: Sequence[str] = ()
    bad_gradients: Sequence[str] = ()
    bad_clipped: Sequence[str] = ()
    bad_parameters: Sequence[str] = ()
    bad_buffers: Sequence[str] = ()
    gradient_norms: Sequence[float] = field(default=(), repr=False)

    @property
    def suspicious(self) -> bool:
        """Whether anything looks non-finite that a step is supposed to keep finite."""
        used = self.stepped and bool(self.bad_clipped if self.changed_gradients else self.bad_gradients)
        return bool(self.bad_losses or used or self.bad_parameters or self.bad_buffers)

    @property
    def unused_gradients(self) -> bool:
        """Whether gradients are bad but no optimizer stepped: a scaler's skip, or an accumulation still under way."""
        return bool(self.bad_gradients) and not self.stepped

    @property
    def mended_gradients(self) -> bool:
        """Whether gradients were bad when backward ended and finite when the optimizer started."""
        return bool(self.bad_gradients) and self.stepped and self.changed_gradients and not self.bad_clipped

    def same_step(self, other: Reading) -> bool:
        """Whether two runs of a step agree bit for bit in losses, gradient norms and parameters."""
        mine = (*self.losses.values(), *self.gradient_norms, self.grad_norm_clipped, self.parameter_norm)
        theirs = (*other.losses.values(), *other.gradient_norms, other.grad_norm_clipped, other.parameter_norm)
        same = all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(mine, theirs, strict=False))
        return same and len(mine) == len(theirs)


class Sentinel:
    """Hooks on the parameters and optimizers that gather norms while a step runs.

    A hook after each gradient's accumulation asks autograd's engine for a callback at the end of that backward: this is
    where gradients are measured, before any clipping.  Nothing is transferred until `read`.

    Attributes:
        bad_before: parameters that were not finite when the sentinel was made.
        num_backwards: how many backwards have ended in this step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        parameters: Mapping[str, Tensor],
        unseen: Callable[[Callable[[], None]], None],
        on_backward: Callable[[], None],
        on_optimizer: Callable[[Optimizer], None],
        after_optimizer: Callable[[Optimizer], None],
    ) -> None:
        self._parameters = dict(parameters)
        self._model = model
        self._persistent = set(model.state_dict(keep_vars=True))
        self._unseen = unseen  # runs a function of ours so that a tracer does not take it for the step's
        self._on_backward, self._on_optimizer, self._after_optimizer = on_backward, on_optimizer, after_optimizer
        first = self._buffer_norms()
        self._known_bad = set(_bad(first))
        self._inf_at_first = {name for name, norm in first.items() if math.isinf(norm)}  # such a one may be reset
        self._after: list[float] | None = None  # parameter norms when the last step ended
        self.bad_before = [name for name, entry in parameters.items() if not is_finite(entry)]
        self._unused_bad = set(self.bad_before)  # a bad parameter that is used shows in the loss or in a gradient
        self._handles = [
            entry.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            for entry in self._parameters.values()
            if entry.requires_grad and entry.is_leaf and not is_lazy(entry)
        ]
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_update))
            self._handles.append(optimizer.register_step_post_hook(self._after_update))
        self.begin()

    def begin(self) -> None:
        """A step starts."""
        self._queued = False
        self.num_backwards = 0
        self._stepped = False
        self._found_inf: list[Tensor] = []
        self._before: tuple[list[str], list[Tensor]] = ([], [])
        self._clipped: tuple[list[str], list[Tensor]] = ([], [])
        self._gradient_versions: tuple[int, ...] = ()

    def close(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def read(self, losses: Mapping[str, Tensor | float]) -> Reading:
        """Judge the step that has just ended."""
        names, tensors = list(self._parameters), list(self._parameters.values())
        parameters = tensor_norms(tensors)
        buffers = self._buffers()
        states = tensor_norms(buffers.values())
        device_losses = {name: entry.detach() for name, entry in losses.items() if isinstance(entry, Tensor)}
        packed = [*self._before[1], *self._clipped[1], *parameters, *states, *device_losses.values(), *self._found_inf]
        received = iter(transfer(packed))
        before = _take(self._before[0], received)
        clipped = _take(self._clipped[0], received)
        after = _take(names, received)
        self._after = list(after.values())
        held = _take(list(buffers), received)
        known = {name: float(entry) for name, entry in losses.items() if not isinstance(entry, Tensor)}
        seen = _take(list(device_losses), received) | known
        stepped = self._stepped or any(next(received) == 0 for _ in self._found_inf)
        return Reading(
            losses={name: seen[name] for name in losses},
            grad_norm=combine(before.values()) if before else math.nan,
            grad_norm_clipped=combine((clipped or before).values()) if before else math.nan,
            parameter_norm=combine(after.values()) if after else math.nan,
            num_backwards=self.num_backwards,
            stepped=stepped,
            changed_gradients=bool(self._clipped[0]),
            bad_losses=_bad(seen),
            bad_gradients=self._confirmed_gradients(before, self._clipped[0] == []),
            bad_clipped=self._confirmed_gradients(clipped, True),
            bad_parameters=self._newly_bad_parameters(after),
            bad_buffers=self._newly_bad(held),
            gradient_norms=tuple(before.values()),
        )

    def _newly_bad(self, states: Mapping[str, float]) -> list[str]:
        """Module buffers that have become non-finite: one that was so from the start is meant to be so."""
        live = self._buffers()
        bad = {name for name in _bad(states) if name in self._persistent and not is_finite(live[name])}
        self._known_bad &= bad
        reset = {name for name in bad & self._inf_at_first if not math.isnan(states[name])}
        return sorted(bad - self._known_bad - reset)

    def _confirmed_gradients(self, norms: Mapping[str, float], untouched: bool) -> list[str]:
        """Gradients whose norm is bad, less those where only the norm overflowed, if they are still there to tell."""
        live = {name: entry.grad for name, entry in self._parameters.items()} if untouched else {}
        return [name for name in _bad(norms) if (held := live.get(name)) is None or not is_finite(held)]

    def _newly_bad_parameters(self, norms: Mapping[str, float]) -> list[str]:
        bad = [name for name in _bad(norms) if not is_finite(self._parameters[name])]
        self._unused_bad &= set(bad)
        return [name for name in bad if name not in self._unused_bad]

    def touched(self) -> bool:
        """Whether a parameter is not what it was when the last step ended; counters miss writes through `.data`."""
        if self._after is None:
            return False
        now = transfer(tensor_norms(self._parameters.values()))
        return any(a != b and not (math.isnan(a) and math.isnan(b)) for a, b in zip(now, self._after, strict=True))

    def accept(self, reading: Reading) -> None:
        """Do not report these buffers and parameters again until they have been finite once: nothing uses them."""
        self._known_bad.update(reading.bad_buffers)
        self._unused_bad.update(reading.bad_parameters)

    def _buffer_norms(self) -> dict[str, float]:
        buffers = self._buffers()
        return dict(zip(buffers, transfer(tensor_norms(buffers.values())), strict=True))

    def _buffers(self) -> dict[str, Tensor]:
        """The module buffers as they are now: code may assign one anew."""
        return {name: entry for name, entry in self._model.named_buffers() if entry.is_floating_point()}

    def _accumulated(self, _parameter: Tensor) -> None:
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _backward_ended(self) -> None:
        self._queued = False
        self.num_backwards += 1
        self._unseen(self._measure_gradients)
        self._unseen(self._on_backward)

    def _measure_gradients(self) -> None:
        names, gradients = self._gradients()
        self._before = (names, tensor_norms(gradients))
        self._gradient_versions = tuple(entry._version for entry in gradients)

    def _before_update(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)
        if isinstance(found_inf, Tensor):  # a GradScaler leaves the skip to the fused kernel
            self._found_inf.append(found_inf.detach().reshape(()))
        else:
            self._stepped = True
        # Under a dispatch mode, foreach kernels write without moving version counters.
        self._unseen(partial(self._measure_clipped, bool(_get_current_dispatch_mode_stack())))
        self._unseen(lambda: self._on_optimizer(optimizer))

    def _measure_clipped(self, uncounted: bool) -> None:
        names, gradients = self._gradients()
        versions = tuple(entry._version for entry in gradients)
        if uncounted or versions != self._gradient_versions or names != self._before[0]:
            self._clipped = (names, tensor_norms(gradients))

    def _after_update(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._unseen(lambda: self._after_optimizer(optimizer))

    def _gradients(self) -> tuple[list[str], list[Tensor]]:
        held = [(name, entry.grad) for name, entry in self._parameters.items() if entry.grad is not None]
        return [name for name, _ in held], [entry for _, entry in held]


def _take(names: Sequence[str], received: Any) -> dict[str, float]:
    return {name: next(received) for name in names}


def _bad(norms: Mapping[str, float]) -> list[str]:
    return [name for name, norm in norms.items() if not math.isfinite(norm)]
