"""Forward and backward hooks: statistics of every module's output and its gradient, on recorded steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.snapshot import tensors_of
from stabilitykit.watch.rows import RowCollector


class ModuleWatch:
    """Hooks on every module of a model.  Between recorded steps a hook returns at once.

    The gradient of an output comes from a hook on the output tensor: a module's own full backward hook refuses in-place
    activations and never fires for outputs that are dictionaries.
    """

    def __init__(self, model: nn.Module, rows: RowCollector, unseen: Callable[[Callable[[], None]], None]) -> None:
        self.recording = False
        self._rows = rows
        self._unseen = unseen
        self._calls: Counter[str] = Counter()
        self._handles = [
            module.register_forward_hook(_Hook(self, name))
            for name, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]

    def begin(self, *, recording: bool) -> None:
        """A step starts, to be recorded or not."""
        self.recording = recording
        self._calls.clear()

    def close(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def record(self, name: str, output: Any) -> None:
        """A module has returned."""
        call = self._calls[name]
        self._calls[name] += 1
        found = [
            (path, tensor) for path, tensor in tensors_of(output) if tensor.is_floating_point() or tensor.is_complex()
        ]
        for position, (_, tensor) in enumerate(found):
            label = name if position == 0 else f"{name}[{position}]"
            self._unseen(lambda label=label, tensor=tensor: self._measure(label, tensor, call))  # type: ignore[misc]
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(self._gradient_hook(label, call))  # type: ignore[no-untyped-call]

    def _measure(self, label: str, tensor: Tensor, call: int) -> None:
        self._rows.add(label, "output", "forward", tensor.detach(), kind="module", call=call)

    def _gradient_hook(self, label: str, call: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self.recording:
                self._unseen(
                    lambda: self._rows.add(
                        label, "output_gradient", "backward", gradient.detach(), kind="module", call=call
                    )
                )

        return hook


class _Hook:
    """A forward hook that a deep copy or a pickle of the model leaves behind, inert."""

    def __init__(self, watch: ModuleWatch | None, name: str) -> None:
        self._watch, self._name = watch, name

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self._watch is not None and self._watch.recording:
            self._watch.record(self._name, output)

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Hook:
        return _Hook(None, self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._name)
