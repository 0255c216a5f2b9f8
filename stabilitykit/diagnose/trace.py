"""Trace one replayed step: every operation below autograd, non-finite values followed from producer to consumer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitykit.diagnose.arguments import Call
from stabilitykit.diagnose.forwards import Forward, Forwards
from stabilitykit.diagnose.graph import Edge, Operation, Source, Symptom, Trace
from stabilitykit.diagnose.integers import Integers
from stabilitykit.diagnose.labels import Labels, storage_key
from stabilitykit.diagnose.numbers import Numbers
from stabilitykit.diagnose.raised import Look, looked_at
from stabilitykit.diagnose.site import Caller, find_caller, user_lines
from stabilitykit.diagnose.storages import Storages, has_nan
from stabilitykit.measure.summary import bad_rows, summarise
from stabilitykit.measure.values import is_finite, make_finite
from stabilitykit.schema import Phase

LARGE = 65_536  # numbers of a tensor that is described in full only where it may be an origin
CHECK_DISTANCE = 4  # operations from `isnan(x)` through `any` and `not` to the number that Python reads


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that follows non-finite values through forward, loss, backward, clipping and optimizer.

    Nothing is kept alive: storages are known by weak references, and only operations with a non-finite output are
    recorded, beside a line and a module name for every differentiable forward operation.
    """

    def __init__(
        self,
        labels: Labels,
        module_names: Mapping[int, str],
        parameters: Mapping[str, Tensor],
        mended: Collection[int] = (),
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels = labels
        self.symptoms: list[Symptom] = []
        self.behind_loss: set[int] = set()  # numbers of the autograd nodes that the step's backwards went through
        self.num_operations = 0
        self._module_names = module_names
        self._parameters = parameters
        self._mended = mended  # operations whose values are made finite
        self._storages = Storages(labels)
        self._numbers = Numbers()
        self._integers = Integers()
        self._forwards = Forwards()
        self._stack: list[tuple[str | None, int]] = []  # a module's name, and the next autograd node's number by then
        self._updating = self._after_backward = False
        self._failed: tuple[int, Source | None] = (-1, None)  # index of an operation, and what was bad in it
        self._checked: tuple[int, Source | None] = (-1, None)
        self._read = -1
        self._looks: list[Look] = []
        self._paused = False

    # What the replay tells the tracer.

    def begin_step(self) -> int:
        """A step begins: what an earlier one made is known, what it showed or read is not; the operations so far."""
        self.symptoms.clear()
        self._numbers = Numbers()
        self.behind_loss.clear()
        self._stack.clear()
        self._looks.clear()
        self._failed = self._checked = (-1, None)
        self._updating = self._after_backward = False
        return self.num_operations

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Operations inside are not the step's: the observers' own."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def enter_module(self, module: nn.Module, _inputs: object) -> None:
        """A module's forward starts; one that is no part of the model, a teacher say, has weights as well."""
        if id(module) not in self._module_names:
            with self.paused():
                for name, parameter in module.named_parameters(recurse=False):
                    if self.labels.kind(parameter) is None:
                        self.labels.add("parameter", f"{type(module).__name__}.{name}", parameter)
        self._stack.append((self._module_names.get(id(module)), torch._C._autograd._get_sequence_nr()))

    def leave_module(self, _module: nn.Module, _inputs: object, _output: object) -> None:
        """A module's forward has ended, or has raised."""
        if self._stack:
            self._stack.pop()

    def backward_ended(self) -> None:
        """A backward has ended: the gradients are as it left them."""
        self._after_backward = True
        self.notice_gradients("gradient")

    def gradients_given(self, gradients: Sequence[Tensor]) -> None:
        """`torch.autograd.grad` has returned; what can be differentiated further is part of the forward."""
        with self.paused():
            for gradient in gradients:
                storage = None if gradient.requires_grad else self._storages.of(gradient)
                if storage is not None:
                    storage.gradient = self._after_backward = True

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
                    storage = self._storages.of(parameter.grad)
                    if storage is not None:
                        storage.gradient = True

    def notice(self, role: str, name: str, tensor: Tensor, *, written: bool = False) -> None:
        """Make a symptom of `tensor` if it is not finite; with `written`, only if the step itself has made it so."""
        with self.paused():
            self.symptoms += [
                Symptom(role, name, source)  # type: ignore[arg-type]
                for source, _ in self._storages.sources(tensor)
                if not written or isinstance(source, Operation)
            ]

    def notice_error(self, error: Exception) -> None:
        """Make a symptom of what an exception is about: the operation that raised, or a check that was read last."""
        failed, source = self._failed
        checked, check = self._checked
        if failed != self.num_operations:
            told = self._read == self.num_operations and self._read - checked <= CHECK_DISTANCE
            source = check if told else None
        source = source or looked_at(error, self._looks)
        if source is not None:
            self.symptoms.append(Symptom("error", type(error).__name__, source))

    def _look(self) -> None:
        """Python has read something, perhaps whether a value is finite."""
        checked, source = self._checked
        if source is not None and self.num_operations - checked <= CHECK_DISTANCE:
            self._looks.append(Look(source, user_lines()))

    def hand_out(self, source: Source, *, nan: bool) -> None:
        """Python holds a non-finite number or array."""
        self._numbers.hand_out(source, nan=nan)

    def exported(self, tensor: Tensor) -> None:
        """A tensor becomes an array or a list, perhaps to come back."""
        if not self._paused:
            with self.paused():
                for source, nan in self._storages.sources(tensor):
                    self.hand_out(source, nan=nan)
                    self._looks.append(Look(source, user_lines()))
                    self._checked, self._read = (self.num_operations, source), self.num_operations

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
        edges = [self._edges(call, argument, tensor) for argument, tensor in call.inputs]
        back = self._back_from_python(call)
        watched = self._finite_module_buffers(call)
        kept = call.keep_overwritten(watched)
        self.num_operations += 1
        try:
            result = func(*args, **kwargs)
        except Exception:
            given = next((edge.source for found in edges for edge in found), None)
            self._failed = self.num_operations, given or self._integers.behind(call)
            raise
        if call.name == "lift_fresh":
            self._lifted(call, result)
        else:
            self._observe(call, result, edges, back, kept, watched)
        return result

    def _observe(
        self,
        call: Call,
        result: Any,
        edges: Sequence[Sequence[Edge]],
        back: Sequence[Edge],
        kept: Mapping[int, Tensor],
        watched: Sequence[Tensor],
    ) -> None:
        derived = self._derives_from_gradient(call)
        for group in call.groups(result):
            found = [edge for position in group.inputs for edge in edges[position]] + list(back)
            bad = [tensor for tensor in group.written if not is_finite(tensor)]
            if self.num_operations in self._mended:
                bad = make_finite(bad)
            operation = self._operation(call, found, bad, group.inputs, kept, derived) if bad else None
            for tensor in group.written:
                self._storages.wrote(tensor, None if is_finite(tensor) else operation, gradient=derived)
        source = next((edge.source for found in edges for edge in found), None)
        self._integers.follow(call, result, source)
        if call.is_check and source is not None:
            self._checked = self.num_operations, source
        if call.is_read:
            self._read = self.num_operations
            self._look()
        if call.gives_number:
            for edge in (edge for found in edges for edge in found):
                self.hand_out(edge.source, nan=edge.nan)
        broken = [tensor for tensor in watched if not is_finite(tensor)]
        if broken:
            found = [edge for entry in edges for edge in entry]
            operation = self._operation(call, found, broken, range(len(edges)), kept, derived)
            for tensor in broken:
                self._storages.wrote(tensor, operation, gradient=derived)
        self._remember_forward(call)

    def _back_from_python(self, call: Call) -> Sequence[Edge]:
        """What a non-finite number among the arguments was, before Python had it.

        An Inf that is only put in place (a mask's) and an optimizer's hyperparameters are nobody's result.
        """
        argument, _, number = call.nonfinite_scalar.partition("=")
        nan = number == "nan"
        if not number or self._updating or (call.places_constant and not nan):
            return ()
        found = self._numbers.origin_of(nan=nan)
        return [Edge(argument, *found)] if found is not None else ()

    def _lifted(self, call: Call, tensor: Tensor) -> None:
        """An array, a list or a number became a tensor."""
        if is_finite(tensor):
            return
        nan = has_nan(tensor)
        found = self._numbers.origin_of(nan=True) if nan else self._numbers.in_batch(summarise(tensor, "data"))
        edges = [Edge("data", *found)] if found is not None else []
        operation = self._operation(call, edges, [tensor], (), {}, derived=False)
        self._storages.wrote(tensor, operation, gradient=False)

    def _remember_forward(self, call: Call) -> None:
        """Note what the nodes that autograd has just made differentiate.

        Inside a custom Function's forward, where gradients are off, the newest node is the Function's own.  A node that
        another's derivative makes, to be differentiated once more, belongs to what that one differentiates.
        """

        def forward(node: int) -> Forward:
            caller = find_caller()
            derived = self._forwards.running() if not caller.in_backward_code else None
            return derived or Forward(call.name, self._module(before=node), caller.site)

        self._forwards.claim(forward)

    def _operation(
        self,
        call: Call,
        edges: Sequence[Edge],
        bad: Sequence[Tensor],
        positions: Sequence[int],
        kept: Mapping[int, Tensor],
        derived: bool,
    ) -> Operation:
        first = bad[0]  # further outputs may be work space that was never written
        may_be_origin = not any(edge.nan for edge in edges)
        output = summarise(first, "output", brief=not may_be_origin and first.numel() > LARGE)
        caller = find_caller()
        phase = self._phase(call, caller, derived)
        node = torch._C._current_autograd_node() if phase == "backward" else None
        forward = self._forwards.running() if node is not None else None
        own_line = phase != "backward" or caller.in_backward_code
        site = caller.site if own_line or forward is None else forward.site  # gradients are added at backward's line
        after = -1 if phase != "backward" else node._sequence_nr() if node and caller.in_backward_code else sys.maxsize
        operation = Operation(
            index=self.num_operations,
            op=call.name if own_line or forward is None else forward.op,
            kernel=call.name,
            phase=phase,
            module=self._module(after=after),
            output=output,
            site=site,
            node=node.name() if node is not None else "",
            edges=list(edges),
            inputs=call.evidence(positions, kept) if may_be_origin else (),
            places_constant=(call.places_constant or caller.scaling) and output.nan == 0,
            scalar=call.nonfinite_scalar,
            rows=bad_rows(first),
            aside=self._after_backward and not call.differentiable,
            own_backward=caller.in_backward_code,
        )
        operation.writes, operation.writes_kind = self._written(bad)
        if not edges and first.dtype in (torch.float16, torch.bfloat16):
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

    def _module(self, *, after: int = -1, before: int = sys.maxsize) -> str:
        """The innermost module of those entered between the making of two nodes: custom Functions may call some.

        In backward where there is none, the module of what is differentiated: with checkpointing, that in which the
        function was first called.
        """
        entries = reversed(self._stack)
        inner = next((name for name, entered in entries if name is not None and after < entered <= before), "")
        if inner or torch._C._current_graph_task_id() == -1:
            return inner
        forward = self._forwards.running()
        return forward.module if forward is not None else ""

    def _written(self, bad: Sequence[Tensor]) -> tuple[str, str]:
        """Name and kind of the parameter, module buffer or gradient among the written tensors."""
        for tensor in bad:
            if name := self.labels.name(tensor):
                return name, self.labels.kind(tensor) or ""
            storage = self._storages.known(tensor)
            if storage is not None and storage.gradient:
                key = storage_key(tensor)
                gradients = ((n, p.grad) for n, p in self._parameters.items() if p.grad is not None)
                name = next((name for name, gradient in gradients if storage_key(gradient) == key), "")
                return name, "gradient" if name else ""
        return "", ""

    # Storages.

    def _edges(self, call: Call, argument: str, tensor: Tensor) -> Sequence[Edge]:
        if self._storages.of(tensor) is None or not call.reads(argument):
            return ()
        sources = self._storages.sources(tensor)
        slots = call.rows_taken(tensor) if sources and argument == "self" else ()
        return [Edge(argument, source, nan, slots) for source, nan in sources]

    def _derives_from_gradient(self, call: Call) -> bool:
        """Whether, after backward and outside the optimizer, the operation reads or writes gradients."""
        if torch._C._current_graph_task_id() != -1 or self._updating or call.differentiable:
            return False
        met = (self._storages.known(tensor) for _, tensor in call.inputs)
        return any(storage.gradient for storage in met if storage is not None)

    def _finite_module_buffers(self, call: Call) -> list[Tensor]:
        """Module buffers among the inputs: batch_norm writes its running statistics without saying so in its schema."""
        return [
            tensor
            for argument, tensor in call.inputs
            if argument not in call.declared_writes
            and self.labels.kind(tensor) == "module_buffer"
            and is_finite(tensor)
        ]
