"""Forward and backward hooks: statistics of every module's output and its gradient, on recorded steps."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _DisableFuncTorch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from stabilitykit.config import MonitorConfig
from stabilitykit.containers import tensors_of
from stabilitykit.measure.norms import tensor_norms, transfer
from stabilitykit.watch.rows import RowCollector

_Norm = tuple[str, Tensor]
TRAIL = 1 << 14  # what is followed without a replay; more has passed since the last update where parts are evaluated


class ModuleWatch:
    """Hooks on every module of a model.  Between recorded steps a hook returns at once.

    The gradient of an output comes from a hook on the output tensor: a module's own full backward hook refuses in-place
    activations and never fires for outputs that are dictionaries.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: RowCollector,
        unseen: Callable[[Callable[[], None]], None],
        config: MonitorConfig,
    ) -> None:
        self._config = config
        self.recording = self._trailing = False
        self._trails = _trails()
        self._thread = get_ident()
        self._evaluating = False  # the model is being called without gradients, in eval mode
        self._rows = rows
        self._unseen = unseen
        self._calls: Counter[str] = Counter()
        self._handles = [
            module.register_forward_hook(_Hook(self, name))
            for name, module in model.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)
        ]
        if not isinstance(model, torch.jit.ScriptModule):
            self._handles.append(model.register_forward_pre_hook(_InputHook(self), with_kwargs=True))

    @property
    def active(self) -> bool:
        """Whether the hooks have anything to do."""
        return self.recording or self._trailing

    def begin(self, *, recording: bool, trailing: bool = False) -> None:
        """A step starts, to be recorded or not; `trailing` keeps a norm of all that passes, for want of a replay.

        The thread that calls this runs the step: what another has the model do meanwhile is no part of it.
        """
        self._thread = get_ident()
        self._evaluating = False
        self.recording, self._trailing = recording, trailing
        self._calls.clear()
        self._trails = _trails()

    def trail(self) -> tuple[list[tuple[str, float]], list[tuple[str, float]], list[tuple[str, float]]]:
        """Names and L2 norms of what passed since `begin`: the model's inputs, module outputs, output gradients."""
        norms = iter(transfer([norm for trail in self._trails for _, norm in trail]))
        inputs, outputs, gradients = ([(name, next(norms)) for name, _ in trail] for trail in self._trails)
        return inputs, outputs, gradients

    def close(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def record(self, name: str, output: Any) -> None:
        """A module has returned."""
        if get_ident() != self._thread:
            return
        if self._evaluating:
            self._evaluating = bool(name)  # the model itself returns last
            return
        call = self._calls[name]
        self._calls[name] += 1
        tensors = (("", output),) if isinstance(output, Tensor) else tensors_of(output)
        for position, (_, tensor) in enumerate(tensors):
            label = name if position == 0 else f"{name}[{position}]"
            if is_functorch_wrapped_tensor(tensor):  # its hooks would see wrappers that are gone when rows are made
                self._unseen(partial(self._measure_beneath, label, name, tensor, call))
                continue
            self._unseen(partial(self._measure, label, name, tensor.detach(), call))
            if tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(self._gradient_hook(label, name, call))  # type: ignore[no-untyped-call]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def record_inputs(self, inputs: Any, *, training: bool) -> None:
        """The model is called, in train or in eval mode.

        Where nobody says when a step begins, one in eval mode and without gradients is an evaluation between two.
        """
        if get_ident() != self._thread:
            return
        self._evaluating = self._trailing and not (training or torch.is_grad_enabled())
        if self._evaluating:
            return
        for path, tensor in tensors_of(inputs):
            if tensor.is_floating_point() and not is_functorch_wrapped_tensor(tensor):
                self._unseen(partial(self._follow, 0, f"input{path}", tensor.detach()))

    def _measure(self, label: str, module: str, tensor: Tensor, call: int) -> None:
        if self.recording and self._config.outputs:
            self._rows.add(label, "output", "forward", tensor, kind="module", call=call)
        self._follow(1, module, tensor)

    def _measure_beneath(self, label: str, module: str, tensor: Tensor, call: int) -> None:
        """Measure what vmap, grad and the other transforms of torch.func have wrapped: all samples at once."""
        while is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
        with _DisableFuncTorch():
            self._measure(label, module, tensor.detach(), call)

    def _measure_gradient(self, label: str, module: str, gradient: Tensor, call: int) -> None:
        if self.recording and self._config.output_gradients:
            self._rows.add(label, "output_gradient", "backward", gradient, kind="module", call=call)
        self._follow(2, module, gradient)

    def _follow(self, which: int, module: str, tensor: Tensor) -> None:
        if self._trailing and (tensor.is_floating_point() or tensor.is_complex()):
            self._trails[which].append((module, tensor_norms([tensor])[0]))

    def _gradient_hook(self, label: str, module: str, call: int) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if self.active:
                self._unseen(partial(self._measure_gradient, label, module, gradient.detach(), call))

        return hook


def _trails() -> tuple[deque[_Norm], deque[_Norm], deque[_Norm]]:
    """Of the model's inputs, module outputs and output gradients: the latest."""
    return deque(maxlen=TRAIL), deque(maxlen=TRAIL), deque(maxlen=TRAIL)


class _Hook:
    """A forward hook that a deep copy or a pickle of the model leaves behind, inert.

    Inside a compiled region it is not there: it would cut the graph in two, and fused kernels round differently.
    """

    def __init__(self, watch: ModuleWatch | None, name: str) -> None:
        self._watch, self._name = watch, name

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self._watch is not None and not torch.compiler.is_compiling() and self._watch.active:
            self._watch.record(self._name, output)

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Hook:
        return _Hook(None, self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None, self._name)


class _InputHook:
    """A forward pre-hook on the root module; inert in a copy."""

    def __init__(self, watch: ModuleWatch | None) -> None:
        self._watch = watch

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._watch is not None and not torch.compiler.is_compiling() and self._watch.active:
            self._watch.record_inputs((*args, *kwargs.values()), training=module.training)

    def __deepcopy__(self, _memo: dict[int, Any]) -> _InputHook:
        return _InputHook(None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _InputHook, (None,)
