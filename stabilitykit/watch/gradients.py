"""The gradient-norm tracker: norms when backward ends, before any clipping, and again when the optimizer starts."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from stabilitykit.measure.norms import Norms, fusible, tensor_norms

FRAMES = 16  # between a hook on a parameter and the call of backward it is due to there are half as many
_APPLY = BackwardCFunction.apply.__code__


class GradientTracker:
    """Hooks on parameters.

    A hook after each gradient's accumulation asks autograd's engine for a callback at the end of that backward: this is
    where gradients are measured. (In each hook, right after a gradient was written, it is not in the cache either: a
    first read of 1 MB takes 76 us, a second 22.)

    Attributes:
        queued: whether the end of the backward that is under way is waited for.
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
        self._names, self._parameters = list(parameters), list(parameters.values())
        self._unseen = unseen  # runs a function of ours so that a tracer does not take it for the step's
        self._on_end = on_end
        self._fusible = all(fusible(entry) for entry in parameters.values())
        hooks = [_hooked(entry, _Accumulated(self)) for entry in parameters.values()]
        self._handles = [handle for handle in hooks if handle is not None]
        self.begin()

    def begin(self) -> None:
        """A step starts."""
        self.queued = False
        self._versions = versions_of(())
        self.num_backwards = 0
        self.before, self.clipped = Norms(), Norms()
        self.changed = False

    def close(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def update_begins(self, *, uncounted: bool = False) -> None:
        """Measure again what has changed since the last backward ended.

        Args:
            uncounted: a dispatch mode is active, under which foreach kernels write without moving version counters.
        """
        names, gradients = self._held()
        versions = versions_of(gradients)
        if uncounted or versions != self._versions or names != self.before.names:
            self.changed = True
            self._versions = versions
            self.clipped = Norms(names, self._norms(gradients))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # where a whole step is compiled, hooks would be as well
    def queue(self) -> None:
        """Ask for a look at the gradients when this backward ends, or the one it is a part of."""
        self.queued = True
        around = _node_around()
        if around is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)
        else:
            _Returned(self, around)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _backward_ended(self) -> None:
        self.queued = False
        self.num_backwards += 1
        self._unseen(self._measure)
        self._unseen(self._on_end)

    def _measure(self) -> None:
        names, gradients = self._held()
        self._versions = versions_of(gradients)
        self.before = Norms(names, self._norms(gradients))
        if self.before.known_bad():  # what changes the gradients next takes away what tells an overflow from an Inf
            self.before.widen(dict(zip(names, gradients, strict=True)))

    def _norms(self, gradients: list[Tensor]) -> Sequence[Tensor]:
        """Of an ordinary parameter, a gradient is ordinary too unless it is sparse or someone put another one there."""
        if self._fusible and all(type(entry) is Tensor and entry.layout == torch.strided for entry in gradients):
            return torch._foreach_norm(gradients) if gradients else ()
        return tensor_norms(gradients)

    def _held(self) -> tuple[list[str], list[Tensor]]:
        """Names and gradients. Ten thousand pairs of them, made anew, would set off the garbage collector."""
        found = [entry.grad for entry in self._parameters]
        there = [grad for grad in found if grad is not None]
        if len(there) == len(found):
            return self._names, there
        return [name for name, grad in zip(self._names, found, strict=True) if grad is not None], there


class _Accumulated:
    """A hook on a parameter: autograd holds it where no garbage collector looks, and it holds nothing in turn."""

    def __init__(self, tracker: GradientTracker) -> None:
        self._tracker = weakref.ref(tracker)

    def __call__(self, _parameter: Tensor) -> None:
        tracker = self._tracker()
        if tracker is not None and not tracker.queued:
            tracker.queue()


class _Returned:
    """A hook on a node whose own backward has run another one: when it returns, the outer one is under way again."""

    def __init__(self, tracker: GradientTracker, node: Any) -> None:
        self._tracker = weakref.ref(tracker)
        self._handle = node.register_hook(self)

    def __call__(self, *_gradients: Any) -> None:
        self._handle.remove()
        tracker = self._tracker()
        if tracker is not None and tracker.queued:
            tracker.queue()


def _node_around() -> Any:
    """The Python function's node within whose backward this backward runs: a reentrant checkpoint's, say."""
    frame: FrameType | None = sys._getframe()
    for _ in range(FRAMES):
        frame = frame.f_back if frame is not None else None
        if frame is not None and frame.f_code is _APPLY:
            return frame.f_locals["self"]
    return None


def _hooked(parameter: Tensor, hook: _Accumulated) -> RemovableHandle | None:
    """Frozen ones get the hook too, since a step may thaw them and freeze others, as those of a GAN do in turn."""
    if is_lazy(parameter) or not parameter.is_leaf or not (parameter.is_floating_point() or parameter.is_complex()):
        return None
    frozen = not parameter.requires_grad
    try:
        if frozen:  # torch takes the hook of one that needs a gradient only, and keeps it when that changes
            parameter.requires_grad_(True)
        return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-any-return, no-untyped-call]
    except RuntimeError:  # made under inference_mode: it never has a gradient
        return None
    finally:
        if frozen:
            parameter.requires_grad_(False)


def versions_of(gradients: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Changes when one is written to, or another is put in its place."""
    return [id(entry) for entry in gradients], [entry._version for entry in gradients]
