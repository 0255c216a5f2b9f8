"""Run a step once more under the tracer, with everything it needs to know plugged in and taken out again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from stabilitykit.containers import tensors_of
from stabilitykit.diagnose.backwards import watching_backward
from stabilitykit.diagnose.graph import Trace
from stabilitykit.diagnose.labels import Labels
from stabilitykit.diagnose.numbers import bad_numbers, batch_leaf, watching_exports
from stabilitykit.diagnose.trace import Tracer
from stabilitykit.measure.values import is_finite
from stabilitykit.snapshot import BUFFER_FIELDS

Settings = Mapping[str, Any]  # a group's, without its parameters


@dataclass(frozen=True)
class Subject:
    """What is traced: a model, its optimizers and the tensors around it."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    parameters: Mapping[str, Tensor]
    replay_buffer: object | None = None


@dataclass(frozen=True)
class Retraced:
    """What the traced run of the step gave.

    Attributes:
        begins: counts the operations before the step, and before each of its leads.
        settings: of the optimizer that has updated a parameter, as they were then, by the parameter's name.
    """

    trace: Trace
    returned: Any
    error: Exception | None
    begins: Sequence[int] = ()
    settings: Mapping[str, Settings] = field(default_factory=dict)


@dataclass(frozen=True)
class Lead:
    """A step before, traced as well: what it made and the script kept can then be followed.

    Attributes:
        step: the function that did it, and the `args` and `kwargs` that it was given.
        settle: given what it returned, puts all that is known as the next step found it; False where the lead did not
            go as it had.
    """

    step: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    settle: Callable[[Any], bool]


def retrace(
    subject: Subject,
    step: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    unused_gradients: bool = False,
    leads: Sequence[Lead] = (),
    mended: Collection[int] = (),
) -> Retraced:
    """Run `step(*args, **kwargs)` under the tracer and notice what it leaves non-finite.

    The caller has put the state back and puts it where it belongs afterwards.  Bad gradients of a step in which no
    optimizer stepped (a scaler's skip) are no symptom, unless `unused_gradients` asks for them.  The `leads` are
    run and traced first; nothing begins where one of them went otherwise than the first time.  What the operations
    `mended`, by their index, give is made finite: the rest of the step shows whether they did the harm.
    """
    labels = _label(subject, args, kwargs)
    names = {id(module): name for name, module in subject.model.named_modules()}
    tracer = Tracer(labels, names, subject.parameters, mended)
    returned, error = None, None
    updated: dict[int, Settings] = {}
    begins: list[int] = []
    with _plugged(tracer, updated), torch.compiler.set_stance("force_eager"):
        for lead in leads:
            begins.append(tracer.begin_step())
            with tracer:
                returned = lead.step(*lead.args, **lead.kwargs)
            if not lead.settle(returned):
                return Retraced(tracer.result(), returned, None)
            updated.clear()
        begins.append(tracer.begin_step())
        for path, tensor in bad_numbers((args, dict(kwargs))):
            tracer.hand_out(batch_leaf(batch_name(path), tensor), nan=bool(tensor.isnan().any()))
        finite_before = {name: is_finite(buffer) for name, buffer in subject.model.named_buffers()}
        try:
            with tracer:
                returned = step(*args, **kwargs)
        except Exception as raised:  # noqa: BLE001 - the step's own error, handed to the caller
            error = raised
    used = {n for n, p in subject.parameters.items() if unused_gradients or id(p) in updated}
    _notice_ends(tracer, subject, returned, error, used, finite_before)
    settings = {n: updated[id(p)] for n, p in subject.parameters.items() if id(p) in updated}
    return Retraced(tracer.result(), returned, error, begins, settings)


def _label(subject: Subject, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Labels:
    labels = Labels()
    for name, parameter in subject.parameters.items():
        labels.add("parameter", name, parameter)
        if parameter.grad is not None and not is_finite(parameter.grad):  # a label keeps what the step lets go of
            labels.add("gradient", name, parameter.grad)
    for name in BUFFER_FIELDS:  # before the module buffers: a replay buffer may be a module, even of the model
        held = subject.replay_buffer
        tensor = held.get(name) if isinstance(held, Mapping) else getattr(held, name, None)
        if isinstance(tensor, Tensor):
            labels.add("replay", name, tensor)
    for name, buffer in subject.model.named_buffers():
        labels.add("module_buffer", name, buffer)
    for path, tensor in tensors_of((args, dict(kwargs))):
        labels.add("batch", batch_name(path), tensor)
    names = {id(parameter): name for name, parameter in subject.parameters.items()}
    for optimizer in subject.optimizers:
        for parameter, state in optimizer.state.items():
            for path, tensor in tensors_of(state):
                labels.add("optimizer_state", names.get(id(parameter), path.strip("[]'")), tensor)
        for group in optimizer.param_groups:
            for key, value in group.items():
                if isinstance(value, Tensor):
                    labels.add("hyperparameter", key, value)
    return labels


def batch_name(path: str) -> str:
    """`[0][0][1]` (first argument, second entry) is `batch[1]`, `[1]['x']` the keyword `x`."""
    if path.startswith("[0][0]"):
        return "batch" + path.removeprefix("[0][0]")
    return path.removeprefix("[1]").strip("[]'") if path.startswith("[1]") else "argument" + path.removeprefix("[0]")


@contextmanager
def _plugged(tracer: Tracer, updated: dict[int, Settings]) -> Iterator[None]:
    """Hooks for a traced step; `updated` is filled with the ids of the parameters that an optimizer updates.

    A scheduler may change the settings when the step ends. Of two optimizers with the same parameter the first that
    has one that is not finite is kept.
    """

    def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found_inf = getattr(optimizer, "found_inf", None)
        if not (isinstance(found_inf, Tensor) and bool(found_inf)):
            with tracer.paused():
                _note_settings(optimizer, updated)
        tracer.enter_optimizer()
        given = {key: tracer.outside_update(value) if callable(value) else value for key, value in kwargs.items()}
        return tuple(tracer.outside_update(entry) if callable(entry) else entry for entry in args), given

    def before_backward(roots: Sequence[Tensor], accumulates: bool) -> None:
        tracer.behind_loss |= _behind(roots)
        for root in roots:
            tracer.notice("loss" if accumulates else "probed", "loss", root)

    def about_to_step(optimizer: Optimizer, *_: object) -> None:
        """Hooks of the user's own come after the global ones, and before the update: ours has to be the last."""
        if optimizer not in hooked:
            hooked.add(optimizer)
            stack.callback(optimizer.register_step_pre_hook(before_step).remove)

    hooked: set[Optimizer] = set()
    with ExitStack() as stack:
        stack.callback(register_module_forward_pre_hook(tracer.enter_module).remove)
        stack.callback(register_module_forward_hook(tracer.leave_module, always_call=True).remove)
        stack.callback(register_optimizer_step_pre_hook(about_to_step).remove)  # of any optimizer, known to us or not
        stack.callback(register_optimizer_step_post_hook(lambda *_: tracer.leave_optimizer()).remove)
        stack.enter_context(watching_exports(tracer.exported))
        stack.enter_context(watching_backward(before_backward, tracer.backward_ended, tracer.gradients_given))
        yield


def _notice_ends(
    tracer: Tracer,
    subject: Subject,
    returned: Any,
    error: Exception | None,
    used: Collection[str],
    finite_before: Mapping[str, bool],
) -> None:
    """What can only be seen when the step is over; `used` names the parameters whose gradients an optimizer used."""
    tracer.symptoms = [
        entry for entry in tracer.symptoms if not entry.role.startswith("gradient") or entry.name in used
    ]
    for _, tensor in tensors_of(returned):
        if tensor.requires_grad and tensor.numel() == 1 and _is_loss(tensor, tracer.behind_loss):
            tracer.notice("returned", "loss", tensor)
    for name, parameter in subject.parameters.items():
        tracer.notice("parameter", name, parameter.detach(), written=True)
    persistent = subject.model.state_dict(keep_vars=True)
    for name, buffer in subject.model.named_buffers():
        if finite_before.get(name, True) and name in persistent:
            tracer.notice("module_buffer", name, buffer)
    if error is not None:
        tracer.notice_error(error)
    if all(entry.role == "probed" for entry in tracer.symptoms):  # a quantity that was differentiated, to no harm
        tracer.symptoms = []


def _note_settings(optimizer: Optimizer, updated: dict[int, Settings]) -> None:
    for group in optimizer.param_groups:
        settings = {
            key: float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
            for key, value in group.items()
            if key != "params"
        }
        for entry in group["params"]:
            earlier = updated.get(id(entry), {}).values()
            if all(math.isfinite(setting) for setting in earlier if isinstance(setting, float)):
                updated[id(entry)] = settings


def _behind(roots: Sequence[Tensor]) -> set[int]:
    """Numbers of the autograd nodes that a backward from `roots` goes through."""
    waiting = [root.grad_fn for root in roots if root.grad_fn is not None]
    met = set(waiting)
    while waiting:
        following = {node for node, _ in waiting.pop().next_functions if node is not None} - met
        met |= following
        waiting += following
    return {node._sequence_nr() for node in met}


def _is_loss(returned: Tensor, behind_loss: Collection[int]) -> bool:
    """Whether a returned number has a part in what was differentiated; any may be a loss where nothing was."""
    return not behind_loss or (returned.grad_fn is not None and returned.grad_fn._sequence_nr() in behind_loss)
