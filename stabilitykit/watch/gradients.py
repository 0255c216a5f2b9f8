"""The gradient-norm tracker: norms when backward ends, before any clipping, and again when the optimizer starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch.nn.parameter import is_lazy

from stabilitykit.measure.norms import Norms, ordinary, tensor_norms

LARGE = 1 << 14  # values: to read them again from memory costs more than a call on its own while they are in the cache


class GradientTracker:
    """Hooks on parameters.

    A hook after each gradient's accumulation asks autograd's engine for a callback at the end of that backward: this is
    where gradients are measured. A large gradient on the CPU is measured in its own hook, where it has just been
    written and is read from the cache (13.7 MB of gradients: 0.4 ms instead of 1.1), and again if it changed since.

    Attributes:
        num_backwards: how many backwards have ended in this step.
        before: norms as the last backward left them.
        clipped: norms as the last optimizer found them; empty where nothing had changed them since.
        changed: whether something had.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        unseen: Callable[[Callable[[], None]], None],
        on_end: Callable[[], None],
    ) -> None:
        self._parameters = parameters
        self._unseen = unseen  # runs a function of ours so that a tracer does not take it for the step's
        self._on_end = on_end
        self._ordinary = all(ordinary(entry) for entry in parameters.values())
        hooked = [entry for entry in parameters.values() if entry.requires_grad and entry.is_leaf]
        self._handles = [
            entry.register_post_accumulate_grad_hook(self._large if _is_large(entry) else self._accumulated)  # type: ignore[no-untyped-call]
            for entry in hooked
            if not is_lazy(entry)
        ]
        self.begin()

    def begin(self) -> None:
        """A step starts."""
        self._queued = False
        self._early: dict[int, tuple[int, int, Tensor]] = {}  # by parameter: gradient and version, its norm
        self._versions: Sequence[tuple[int, int]] = ()
        self.num_backwards = 0
        self.before, self.clipped = Norms(), Norms()
        self.changed = False

    def close(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def update_begins(self) -> None:
        """Measure again what has changed since the last backward ended."""
        names, gradients = self._held()
        versions = _versions(gradients)
        # Under a dispatch mode, foreach kernels write without moving version counters.
        if versions != self._versions or names != self.before.names or _len_torch_dispatch_stack():
            self.changed = True
            self._versions = versions
            self.clipped = Norms(names, self._norms(gradients))

    def _accumulated(self, _parameter: Tensor) -> None:
        if not self._queued:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)

    def _large(self, parameter: Tensor) -> None:
        self._accumulated(parameter)
        if not _len_torch_dispatch_stack():
            self._unseen(partial(self._measure_early, parameter))

    def _measure_early(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and gradient.layout == torch.strided and type(gradient) is Tensor:
            norm = torch.linalg.vector_norm(gradient)
            self._early[id(parameter)] = (id(gradient), gradient._version, norm)

    def _backward_ended(self) -> None:
        self._queued = False
        self.num_backwards += 1
        self._unseen(self._measure)
        self._unseen(self._on_end)

    def _measure(self) -> None:
        names, gradients = self._held()
        self._versions = _versions(gradients)
        early = self._taken_early()
        rest = iter(self._norms([entry for entry in gradients if id(entry) not in early]))
        self.before = Norms(names, [early[id(entry)] if id(entry) in early else next(rest) for entry in gradients])

    def _norms(self, gradients: list[Tensor]) -> Sequence[Tensor]:
        """Of an ordinary parameter, a gradient is ordinary too unless it is sparse or someone put another one there."""
        if self._ordinary and all(type(entry) is Tensor and entry.layout == torch.strided for entry in gradients):
            return torch._foreach_norm(gradients) if gradients else ()
        return tensor_norms(gradients)

    def _taken_early(self) -> dict[int, Tensor]:
        """Norms by gradient, of those that are still what they were; a step may backward more than once."""
        still = {}
        for parameter in self._parameters.values():
            if (known := self._early.get(id(parameter))) and (gradient := parameter.grad) is not None:
                which, version, norm = known
                if which == id(gradient) and version == gradient._version:
                    still[which] = norm
        self._early.clear()
        return still

    def _held(self) -> tuple[list[str], list[Tensor]]:
        held = [(name, grad) for name, entry in self._parameters.items() if (grad := entry.grad) is not None]
        return [name for name, _ in held], [grad for _, grad in held]


def _is_large(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu" and ordinary(parameter) and parameter.numel() >= LARGE


def _versions(gradients: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(entry), entry._version) for entry in gradients]
