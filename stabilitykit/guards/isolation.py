"""Guard 5: a computation on the side from which nothing leaks into training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stabilitykit.guards.guard import Guard
from stabilitykit.random_states import RandomStates


class Isolation(Guard):
    """A context in which the model can be used, and after which training is where it was, bit for bit.

    `model.eval()` ... `model.train()` around a scoring thaws frozen layers, moves the random streams, and leaves the
    model in eval mode when the scoring raises. In the block there is no graph and the model is in eval mode; afterwards
    gradients, module modes, module buffers and the random streams of torch, Python and NumPy are as before:

        isolation = Isolation(model)
        for x, y in loader:
            with isolation():
                scores = score(model, buffer)
            train_step(x, y)

    It acts, and says so, when the block had left something behind.

    Args:
        model: what the block may use.
        weights: put the parameters back as well, at the price of a copy of them; without it a block that wrote into
            them is reported.
        contain: an exception of the block is an event and goes no further.
    """

    name: ClassVar[str] = "isolation"

    def __init__(
        self, model: nn.Module, *, weights: bool = False, contain: bool = False, on_event: object | None = None
    ) -> None:
        super().__init__(on_event)
        self.model, self.weights, self.contain = model, weights, contain

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The block."""
        before = _State(self.model, weights=self.weights)
        try:
            self.model.eval()
            with torch.no_grad():
                yield
        except Exception as error:
            if not self.contain:
                raise
            self.acted(f"isolated computation raised {error!r:.200}; contained", severity="error")
        finally:
            leaked = before.put_back()
            if leaked:
                found = ", ".join(leaked)
                self.acted(f"isolated computation changed {found}; put back", leaked=leaked, phase="state")
            if before.weights_written and not self.weights:
                self.acted("isolated computation wrote into parameters; give weights=True", severity="error")


def isolated(model: nn.Module) -> AbstractContextManager[None]:
    """The same for one block, with nobody told."""
    return Isolation(model)()


class _State:
    """What a computation on the side could change."""

    def __init__(self, model: nn.Module, *, weights: bool) -> None:
        self.random = RandomStates.capture()
        self.modes = [(module, module.training) for module in model.modules()]
        self.slots = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]
        parameters = [entry for entry in model.parameters() if not is_lazy(entry)]
        self.versions = [(entry, entry._version) for entry in parameters]
        self.copies = [entry.detach().clone() for entry in parameters] if weights else []
        self.gradients = [(entry, entry.grad) for entry in parameters]
        for entry in parameters:  # a backward in the block then cannot add to training's gradients
            entry.grad = None
        self.weights_written = False

    def put_back(self) -> list[str]:
        """Restore everything; what had been changed."""
        leaked = []
        if any(entry.grad is not None for entry, _ in self.gradients):
            leaked.append("gradients")
        for entry, gradient in self.gradients:
            entry.grad = gradient
        if self._restore_buffers():
            leaked.append("module buffers")
        self.weights_written = any(entry._version != version for entry, version in self.versions)
        if self.weights_written and self.copies:
            leaked.append("parameters")
            with torch.no_grad():
                for (entry, _), held in zip(self.versions, self.copies, strict=True):
                    entry.copy_(held)
        # Eval mode is what the block was given: only a module that left it was moved by the block itself.
        if any(module.training for module, _ in self.modes):
            leaked.append("module modes")
        for module, training in self.modes:
            module.training = training  # not train(): it would recurse into children that differ
        if _moved(self.random):
            leaked.append("random streams")
            self.random.restore()
        return leaked

    def _restore_buffers(self) -> bool:
        changed = False
        with torch.no_grad():
            for module, name, buffer, held in self.slots:
                if module._buffers.get(name) is not buffer or not _same(buffer, held):
                    module._buffers[name] = buffer.copy_(held)
                    changed = True
        return changed


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def _moved(before: RandomStates) -> bool:
    now = RandomStates.capture()
    return not (
        torch.equal(now.torch_cpu, before.torch_cpu)
        and len(now.torch_cuda) == len(before.torch_cuda)
        and all(map(torch.equal, now.torch_cuda, before.torch_cuda))
        and now.python == before.python
        and _numpy_words(now) == _numpy_words(before)
    )


def _numpy_words(states: RandomStates) -> list[object]:
    return [part.tobytes() if isinstance(part, np.ndarray) else part for part in tuple(states.numpy)]
