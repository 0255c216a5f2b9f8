"""The check of every step: loss, gradients before and after clipping, parameters, module buffers; one transfer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from stabilitykit.measure.norms import Norms, transfer
from stabilitykit.measure.values import is_finite
from stabilitykit.watch.gradients import GradientTracker
from stabilitykit.watch.module_buffers import ModuleBuffers
from stabilitykit.watch.reading import Reading
from stabilitykit.watch.writes import ParameterNorms


class Sentinel:
    """Norms gathered while a step runs, and the judgement of it.  Nothing is transferred until `read`.

    Attributes:
        gradients: the tracker of gradient norms.
        bad_before: parameters that were not finite when the sentinel was made.
        updating: the optimizers that have begun to step in this step.
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
        self._unseen = unseen
        self._on_optimizer, self._after_optimizer = on_optimizer, after_optimizer
        self._buffers = ModuleBuffers(model)
        self._norms = ParameterNorms(parameters)
        self.gradients = GradientTracker(self._parameters, unseen, on_backward)
        self.bad_before = [name for name, entry in parameters.items() if not is_finite(entry)]
        self._unused_bad = set(self.bad_before)  # a bad parameter that is used shows in the loss or in a gradient
        self._handles: list[tuple[Optimizer, RemovableHandle]] = []
        try:
            for optimizer in optimizers:
                self.follow(optimizer)
        except BaseException:
            self.close()
            raise
        self.begin()

    def follow(self, optimizer: Optimizer) -> None:
        """Take an optimizer's steps for updates of what is watched."""
        self._handles.append((optimizer, optimizer.register_step_pre_hook(self._before_update)))
        self._handles.append((optimizer, optimizer.register_step_post_hook(self._after_update)))

    def leave(self, optimizer: Optimizer) -> None:
        """Follow it no longer."""
        for entry, handle in self._handles:
            if entry is optimizer:
                handle.remove()
        self._handles = [(entry, handle) for entry, handle in self._handles if entry is not optimizer]

    def begin(self, *, trailing: bool = False) -> None:
        """A step starts; `trailing`: it is judged before each update, which answers for its own gradients alone."""
        self.gradients.begin()
        self._trailing = trailing
        self.updating: list[Optimizer] = []
        self._stepping: list[tuple[Optimizer, Tensor | None]] = []  # with what a GradScaler tells the fused kernel
        self._late: Mapping[str, Tensor] = {}

    def close(self) -> None:
        """Take every hook off."""
        self.gradients.close()
        for _, handle in self._handles:
            handle.remove()
        self._handles.clear()

    def read(self, losses: Mapping[str, Tensor | float], excused: Collection[str] = ()) -> Reading:
        """Judge the step that has just ended; losses that are `excused` may be anything."""
        before, clipped, after, buffers = norms = (
            self.gradients.before,
            self.gradients.clipped,
            self._norms.measure(),
            self._buffers.norms(),
        )
        on_device = {name: entry.detach() for name, entry in losses.items() if isinstance(entry, Tensor)}
        waiting = [scalar for group in norms for scalar in group.pending]
        found_inf = [entry for _, entry in self._stepping if entry is not None]
        received = iter(transfer([*waiting, *on_device.values(), *found_inf]))
        for group in norms:
            group.finish(received)
        self._norms.step_ended(after.values)
        brought = {name: next(received) for name in on_device}
        seen = {name: brought[name] if name in brought else float(entry) for name, entry in losses.items()}
        stepping = [optimizer for optimizer, found in self._stepping if found is None or next(received) == 0]
        changed = self.gradients.changed
        for gradients in [clipped] if changed else [before, clipped]:
            if gradients.bad():
                gradients.widen(
                    {name: grad for name, entry in self._parameters.items() if (grad := entry.grad) is not None}
                )
        bad_gradients = self._confirmed_gradients(before, still_there=not changed)
        bad_clipped = self._confirmed_gradients(clipped, still_there=True)
        return Reading(
            losses=seen,
            grad_norm=before.whole,
            grad_norm_clipped=(clipped if before.values and clipped.values else before).whole,
            parameter_norm=after.whole,
            num_backwards=self.gradients.num_backwards,
            stepped=bool(stepping),
            changed_gradients=changed,
            bad_losses=[name for name, value in seen.items() if not math.isfinite(value) and name not in excused],
            bad_gradients=bad_gradients,
            bad_clipped=bad_clipped,
            bad_used=self._held_by(stepping, bad_clipped if changed else bad_gradients),
            bad_parameters=self._newly_bad_parameters(after),
            bad_buffers=self._buffers.newly_bad(buffers),
            gradient_norms=before.values,
        )

    def touched(self) -> bool:
        """Whether a parameter was written to since the last step ended; see `ParameterNorms.touched`."""
        return self._norms.touched()

    def late_writes(self) -> Mapping[str, Tensor]:
        """Parameters written to since the last step, which `touched` had missed, as this step has used them."""
        return self._late if self.updating else self._norms.written()

    def forget(self) -> None:
        """The parameters are about to be put somewhere else, by us."""
        self._norms.step_ended(())

    def refresh(self) -> None:
        """Look for module buffers that were registered since."""
        self._buffers.refresh()

    def accept(self, reading: Reading) -> None:
        """Do not report these buffers and parameters again until they have been finite once: nothing uses them."""
        self._buffers.accept(reading.bad_buffers)
        self._unused_bad.update(reading.bad_parameters)

    def _confirmed_gradients(self, norms: Norms, *, still_there: bool) -> Sequence[str]:
        """Gradients whose norm is bad, less those where only the norm overflowed, if they are still there to tell."""
        live = self._parameters if still_there else {}
        return [
            name
            for name in norms.bad()
            if name not in live or (gradient := live[name].grad) is None or not is_finite(gradient)
        ]

    def _held_by(self, optimizers: Sequence[Optimizer], names: Sequence[str]) -> Sequence[str]:
        """Those of the named parameters that one of the optimizers updates."""
        if not names:
            return ()
        held = {id(entry) for optimizer in optimizers for group in optimizer.param_groups for entry in group["params"]}
        return [name for name in names if id(self._parameters[name]) in held]

    def _newly_bad_parameters(self, norms: Norms) -> Sequence[str]:
        bad = [name for name in norms.bad() if not is_finite(self._parameters[name])]
        self._unused_bad &= set(bad)
        return [name for name in bad if name not in self._unused_bad]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_update(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        found_inf = getattr(optimizer, "found_inf", None)  # a GradScaler leaves the skip to the fused kernel
        if self._trailing:
            self._stepping.clear()
        found = found_inf.detach().reshape(()) if isinstance(found_inf, Tensor) else None
        self._stepping.append((optimizer, found))
        self._unseen(partial(self.gradients.update_begins, uncounted=_len_torch_dispatch_stack() > 0))
        if not self.updating and self._norms.in_portions:
            self._unseen(self._keep_late_writes)
        self.updating.append(optimizer)
        self._unseen(lambda: self._on_optimizer(optimizer))

    def _keep_late_writes(self) -> None:
        if self.gradients.before.known_bad():
            self._late = self._norms.written()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after_update(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._unseen(lambda: self._after_optimizer(optimizer))
