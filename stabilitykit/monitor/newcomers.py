"""Optimizers that are made after a monitor was attached, noticed when one of them is about to step."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stabilitykit.monitor.history import History
from stabilitykit.snapshot import TrainingState
from stabilitykit.watch.watch import Watch


class Newcomers:
    """One hook on all optimizers, which tells of those that nobody has named.

    A task often makes an optimizer of its own. Its state would not be put back on a replay, so that the run would go on
    from another one, and a plain loop would have no more steps.

    Args:
        model: whose parameters are watched.
        arrived: told, before its first step, of an optimizer that holds one of them. A bound method, held weakly as the
            model is: the hook is torch's, and keeps nothing alive.
    """

    def __init__(self, model: nn.Module, arrived: Callable[[Optimizer], None]) -> None:
        self._model, self._arrived = weakref.ref(model), weakref.WeakMethod(arrived)
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._handle = register_optimizer_step_pre_hook(self._before_update)
        self.close = self._handle.remove

    def has_stepped(self, optimizer: Optimizer) -> bool:
        """Whether it has been seen to step."""
        return optimizer in self._seen

    def forget(self, optimizer: Optimizer) -> None:
        """Tell of it again should it come back."""
        self._seen.discard(optimizer)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before_update(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if optimizer in self._seen:
            return
        self._seen.add(optimizer)
        model, arrived = self._model(), self._arrived()
        if model is None or arrived is None or identities(optimizer).isdisjoint(map(id, model.parameters())):
            return
        arrived(optimizer)


def take_in(newcomer: Optimizer, newcomers: Newcomers, state: TrainingState, watch: Watch, history: History) -> None:
    """Watch an optimizer and put it back with the rest from now on; let go of those it replaces.

    It replaces one whose parameters it has all taken over and which does not step beside it in this step.
    """
    taken = identities(newcomer)
    replaced = [
        entry
        for entry in state.optimizers
        if newcomers.has_stepped(entry) and entry not in watch.updating and identities(entry) <= taken
    ]
    state.join(newcomer, state.optimizers.index(replaced[0]) if replaced else len(state.optimizers))
    history.cut(updated=bool(watch.updating))
    for entry in replaced:
        state.leave(entry)
        watch.leave(entry)
        newcomers.forget(entry)
    watch.follow(newcomer)


def identities(optimizer: Optimizer) -> set[int]:
    """Which parameters an optimizer holds."""
    return {id(entry) for group in optimizer.param_groups for entry in group["params"]}
