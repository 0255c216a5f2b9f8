"""Trace one replayed step: every operation below autograd, non-finite values followed from producer to consumer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitykit.diagnose.arguments import Call
from stabilitykit.diagnose.graph import Edge, Operation, Source, Symptom, Trace
from stabilitykit.diagnose.labels import Labels, storage_key
from stabilitykit.diagnose.site import NOWHERE, Caller, Site, find_caller
from stabilitykit.measure.summary import bad_rows, summarise
from stabilitykit.measure.values import is_finite, values
from stabilitykit.schema import Phase

LARGE = 65_536  # numbers of a tensor that is described in full only where it may be an origin
CHECK_DISTANCE = 4  # operations from `isnan(x)` through `any` and `not` to the number that Python reads


@dataclass(slots=True, eq=False)
class _Storage:
    """What is known of one storage.  The weak reference keeps its address from being given to another."""

    reference: StorageWeakRef
    source: Source | None  # None: finite throughout
    gradient: bool = False  # a parameter's gradient, or computed from one after backward


@dataclass(frozen=True, slots=True)
class _Forward:
    """What a backward node differentiates."""

    op: str
    module: str
    site: Site


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that follows non-finite values through forward, loss, backward, clipping and optimizer.

    Nothing is kept alive: storages are known by weak references, and only operations with a non-finite output are
    recorded, beside a line and a module name for every differentiable forward operation.
    """

    def __init__(self, labels: Labels, module_names: Mapping[int, str], parameters: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = labels
        self.symptoms: list[Symptom] = []
        self.num_operations = 0
        self._module_names = module_names
        self._parameters = parameters
        self._storages: dict[int, _Storage] = {}
        self._forwards: dict[int, _Forward] = {}
        self._stack: list[str | None] = []
        self._updating = self._after_backward = False
        self._failed: tuple[int, Source | None] = (-1, None)  # index of an operation, and what was bad in it
        self._checked: tuple[int, Source | None] = (-1, None)
        self._read = -1
        self._paused = False

    # What the replay tells the tracer.

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Operations inside are not the step's: the observers' own."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def enter_module(self, module: nn.Module, _inputs: object) -> None:
        """A module's forward starts."""
        self._stack.append(self._module_names.get(id(module)))

    def leave_module(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        """A module's forward has ended, or has raised."""
        if self._stack:
            self._stack.pop()

    def backward_ended(self) -> None:
        """A backward has ended: the gradients are as it left them."""
        self._after_backward = True
        self.notice_gradients("gradient")

    def enter_optimizer(self) -> None:
        """An optimizer's step starts: a gradient that was bad and has been mended since does no harm."""
        self.symptoms = [entry for entry in self.symptoms if entry.role != "gradient" or self._still_bad(entry.name)]
        self.notice_gradients("gradient_clipped")
        self._updating = True

    def _still_bad(self, name: str) -> bool:
        gradient = self._parameters[name].grad
        with self.paused():
            return gradient is None or not is_finite(gradient)

    def leave_optimizer(self) -> None:
        """An optimizer's step has ended."""
        self._updating = False

    def outside_update(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """A closure that an optimizer was given, run as the step's own code and not as part of the update."""

        def run() -> Any:
            self._updating = False
            try:
                return closure()
            finally:
                self.enter_optimizer()

        return run

    def notice_gradients(self, role: str) -> None:
        """Look at every parameter's gradient as it is now."""
        with self.paused():
            for name, parameter in self._parameters.items():
                if parameter.grad is not None:
                    self.notice(role, name, parameter.grad)
                    storage = self._storage(parameter.grad)
                    if storage is not None:
                        storage.gradient = True

    def notice(self, role: str, name: str, tensor: Tensor, *, written: bool = False) -> None:
        """Make a symptom of `tensor` if it is not finite; with `written`, only if the step itself has made it so."""
        with self.paused():
            storage = self._storage(tensor)
            if storage is None or storage.source is None or is_finite(tensor):
                return
            if not written or isinstance(storage.source, Operation):
                self.symptoms.append(Symptom(role, name, storage.source))  # type: ignore[arg-type]

    def notice_error(self, error: Exception) -> None:
        """Make a symptom of what an exception is about: the operation that raised, or a check that was read last."""
        failed, source = self._failed
        checked, check = self._checked
        if failed != self.num_operations:
            told = self._read == self.num_operations and self._read - checked <= CHECK_DISTANCE
            source = check if told else None
        if source is not None:
            self.symptoms.append(Symptom("error", type(error).__name__, source))

    def result(self) -> Trace:
        """What has been gathered so far."""
        return Trace(tuple(self.symptoms), self.num_operations, self.labels.batch_size)

    # What torch tells the tracer.

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused or func.namespace == "profiler":
            return func(*args, **kwargs)
        call = Call(func, args, kwargs)
        edges = [self._edge(call, argument, tensor) for argument, tensor in call.inputs]
        watched = self._finite_module_buffers(call)
        kept = call.keep_overwritten(watched)
        self.num_operations += 1
        try:
            result = func(*args, **kwargs)
        except Exception:
            self._failed = self.num_operations, next((edge.source for edge in edges if edge is not None), None)
            raise
        self._observe(call, result, edges, kept, watched)
        return result

    def _observe(
        self, call: Call, result: Any, edges: list[Edge | None], kept: Mapping[int, Tensor], watched: Sequence[Tensor]
    ) -> None:
        derived = self._derives_from_gradient(call)
        for group in call.groups(result):
            found = [edges[position] for position in group.inputs if edges[position] is not None]
            bad = [tensor for tensor in group.written if not is_finite(tensor)]
            operation = self._operation(call, found, bad, group.inputs, kept, derived) if bad else None
            for tensor in group.written:
                self._wrote(tensor, operation if operation and not is_finite(tensor) else None, derived)
        if call.is_check and (source := next((edge.source for edge in edges if edge), None)):
            self._checked = self.num_operations, source
        if call.is_read:
            self._read = self.num_operations
        broken = [tensor for tensor in watched if not is_finite(tensor)]
        if broken:
            found = [edge for edge in edges if edge is not None]
            operation = self._operation(call, found, broken, range(len(edges)), kept, derived)
            for tensor in broken:
                self._wrote(tensor, operation, derived)
        self._remember_forward(call)

    def _remember_forward(self, call: Call) -> None:
        """Note what the newest autograd node differentiates: nodes are numbered just before their kernel is dispatched.

        Inside a custom Function's forward, where gradients are off, the newest node is the Function's own.
        """
        if call.name == "lift_fresh":
            self.labels.add("literal", "", call.inputs[0][1])
        if self._updating or not (call.differentiable or not torch.is_grad_enabled()):
            return
        sequence = torch._C._autograd._get_sequence_nr() - 1
        if sequence not in self._forwards:
            self._forwards[sequence] = _Forward(call.name, self._module(), find_caller().site)

    def _operation(
        self,
        call: Call,
        edges: Sequence[Edge | None],
        bad: Sequence[Tensor],
        positions: Sequence[int],
        kept: Mapping[int, Tensor],
        derived: bool,
    ) -> Operation:
        first = bad[0]  # further outputs may be work space that was never written
        known = [edge for edge in edges if edge is not None]
        may_be_origin = not any(edge.nan for edge in known)
        output = summarise(first, "output", brief=not may_be_origin and first.numel() > LARGE)
        caller = find_caller()
        phase = self._phase(call, caller, derived)
        node = torch._C._current_autograd_node() if phase == "backward" else None
        forward = self._forwards.get(node._sequence_nr()) if node is not None else None
        own_line = phase != "backward" or caller.in_backward_code
        site = caller.site if own_line else forward.site if forward else NOWHERE
        operation = Operation(
            index=self.num_operations,
            op=call.name if own_line or forward is None else forward.op,
            kernel=call.name,
            phase=phase,
            module=self._module() if phase != "backward" else forward.module if forward else "",
            output=output,
            site=site,
            node=node.name() if node is not None else "",
            edges=known,
            inputs=call.evidence(positions, kept) if may_be_origin else (),
            places_constant=call.places_constant and output.nan == 0,
            scalar=call.nonfinite_scalar,
            rows=bad_rows(first),
            aside=self._after_backward and not call.differentiable,
            writes=self._written_name(bad),
        )
        if not known and first.dtype in (torch.float16, torch.bfloat16):
            operation.exact_absmax = call.absmax_in_float64(kept)
        return operation

    def _phase(self, call: Call, caller: Caller, derived: bool) -> Phase:
        if self._updating:  # also one that steps inside backward, in a hook
            return "optimizer"
        if torch._C._current_graph_task_id() != -1:
            return "forward" if caller.recomputed else "backward"
        if derived:
            return "clip"
        written = [self.labels.kind(tensor) for tensor in call.overwritten]
        return "optimizer" if "parameter" in written and not torch.is_grad_enabled() else "forward"

    def _module(self) -> str:
        return next((name for name in reversed(self._stack) if name is not None), "")

    def _written_name(self, bad: Sequence[Tensor]) -> str:
        for tensor in bad:
            if name := self.labels.name(tensor):
                return name
            key = storage_key(tensor)
            storage = self._storages.get(key) if key is not None else None
            if storage is not None and storage.gradient:
                gradients = ((n, p.grad) for n, p in self._parameters.items() if p.grad is not None)
                return next((name for name, gradient in gradients if storage_key(gradient) == key), "")
        return ""

    # Storages.

    def _storage(self, tensor: Tensor) -> _Storage | None:
        """What is known of the tensor's storage, looking at it when it is first met."""
        key = storage_key(tensor)
        if key is None:
            return None
        known = self._storages.get(key)
        if known is None:
            known = _Storage(_reference(tensor), None)
            self._storages[key] = known
            whole = _whole(tensor)
            if not is_finite(whole):
                known.source = self.labels.leaf(key, whole)
            known.gradient = self.labels.kind(tensor) == "gradient"
        return known

    def _edge(self, call: Call, argument: str, tensor: Tensor) -> Edge | None:
        storage = self._storage(tensor)
        if storage is None or storage.source is None or not call.reads(argument) or is_finite(tensor):
            return None
        plain = values(tensor)
        nan = plain is not None and bool(plain.isnan().any())
        return Edge(argument, storage.source, nan, call.rows_taken(tensor) if argument == "self" else ())

    def _wrote(self, tensor: Tensor, operation: Operation | None, derived: bool) -> None:
        key = storage_key(tensor)
        if key is None:
            return
        known = self._storages.get(key)
        if known is None:
            self._storages[key] = _Storage(_reference(tensor), operation, derived)
        elif operation is not None or _covers_storage(tensor) or is_finite(_whole(tensor)):
            known.source = operation
            known.gradient = known.gradient or derived

    def _derives_from_gradient(self, call: Call) -> bool:
        """Whether, after backward and outside the optimizer, the operation reads or writes gradients."""
        if torch._C._current_graph_task_id() != -1 or self._updating or call.differentiable:
            return False
        keys = [storage_key(tensor) for _, tensor in call.inputs]
        return any(key in self._storages and self._storages[key].gradient for key in keys if key is not None)

    def _finite_module_buffers(self, call: Call) -> list[Tensor]:
        """Module buffers among the inputs: batch_norm writes its running statistics without saying so in its schema."""
        return [
            tensor
            for argument, tensor in call.inputs
            if argument not in call.declared_writes
            and self.labels.kind(tensor) == "module_buffer"
            and is_finite(tensor)
        ]


def _reference(tensor: Tensor) -> StorageWeakRef:
    if tensor.layout == torch.sparse_coo:
        tensor = tensor._values()
    elif tensor.layout != torch.strided:
        tensor = tensor.values()
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _whole(tensor: Tensor) -> Tensor:
    """All of the storage behind a view, in the view's dtype."""
    if tensor.layout != torch.strided or _covers_storage(tensor) or tensor.is_quantized:
        return tensor
    storage = tensor.untyped_storage()
    if storage.nbytes() % tensor.element_size():
        return tensor
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)


def _covers_storage(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.nbytes == tensor.untyped_storage().nbytes()


@contextmanager
def watching_backward(before: Callable[[list[Tensor]], None], after: Callable[[], None]) -> Iterator[None]:
    """Report the roots of every backward in the block, and the end of those that leave gradients.

    A backward has no hook for its roots, so `torch.autograd`'s two entry points are wrapped, during a replay only.
    """
    backward, grad = torch.autograd.backward, torch.autograd.grad

    def watched_backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        before([tensors] if isinstance(tensors, Tensor) else list(tensors))
        backward(tensors, *args, **kwargs)
        after()

    def watched_grad(outputs: Any, *args: Any, **kwargs: Any) -> Any:
        before([outputs] if isinstance(outputs, Tensor) else list(outputs))
        return grad(outputs, *args, **kwargs)

    torch.autograd.backward, torch.autograd.grad = watched_backward, watched_grad
    try:
        yield
    finally:
        torch.autograd.backward, torch.autograd.grad = backward, grad
