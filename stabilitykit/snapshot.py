"""Capture and restore all that a training step can change, bit for bit; for the replay and the guards."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stabilitykit.containers import PLAIN, holds_live, leaves_of, tensors_of
from stabilitykit.errors import UsageError
from stabilitykit.random_states import RandomStates

_VERSION, _TRAINING, _REQUIRES_GRAD = map(attrgetter, ("_version", "training", "requires_grad"))
BUFFER_FIELDS = ("examples", "labels", "logits", "task_labels", "uids", "inserted_steps")


Groups = tuple[dict[str, Any], ...]  # of an optimizer, its parameters by reference


@dataclass(frozen=True)
class Moment:
    """What may change between two steps without a trace: random streams, hyperparameters, schedulers; cheap to hold."""

    random: RandomStates
    hyperparameters: tuple[tuple[Optimizer, Groups], ...]
    schedulers: tuple[tuple[LRScheduler, dict[str, Any]], ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """A training state, detached from the live one: `TrainingState.restore` puts it back, as often as wanted."""

    moment: Moment
    tensors: tuple[tuple[Tensor, Tensor], ...]  # live parameter or module buffer, its copy
    buffers: tuple[tuple[nn.Module, str, Tensor], ...]  # which tensor each module's buffer was: code may assign anew
    gradients: tuple[tuple[Tensor, weakref.ref[Tensor] | None, Tensor | None], ...]  # parameter, its gradient, the copy
    optimizer_states: tuple[tuple[Optimizer, dict[Tensor, Any]], ...]
    modes: tuple[tuple[nn.Module, bool], ...]
    extras: tuple[Any, ...]

    @property
    def num_bytes(self) -> int:
        """Memory held by the copies of parameters, buffers, gradients, optimizer states and the caller's tensors."""
        # Without their keys, which are tensors, and would be printed in a path.
        states = [list(state.values()) for _, state in self.optimizer_states]
        extras = [[copied for _, copied in held.values()] if type(held) is _Contents else held for held in self.extras]
        copies = ([held for _, held in self.tensors], [held for _, _, held in self.gradients], states, extras)
        return sum(held.nbytes for _, held in tensors_of(copies) if held.layout == torch.strided)


class TrainingState:
    """The live objects a step changes: model, optimizers, GradScaler, random streams and the caller's stateful objects.

    Args:
        model: its parameters, buffers (persistent or not), gradients and train/eval modes are captured.
        optimizers: state and hyperparameters; parameters that are not the model's are captured as well.
        stateful: objects with `state_dict`/`load_state_dict` (a GradScaler, a scheduler, a replay buffer), modules,
            tensors, generators (`get_state`/`set_state`), or anything with tensors `examples, labels, logits`.

    Raises:
        UsageError: an entry of `stateful` is none of these.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], stateful: Iterable[object] = ()) -> None:
        self.model = model
        self.optimizers = list(optimizers)
        self._joined: dict[Optimizer, tuple[Groups, dict[Tensor, Any]]] = {}
        self.modules = (model, *(entry for entry in stateful if isinstance(entry, nn.Module)))
        unique = {id(entry): entry for entry in stateful if not isinstance(entry, nn.Module)}
        self.on_error: Callable[[Exception], None] | None = None  # told of an object that refuses its own state
        self._extras = tuple(_Extra.of(entry) for entry in unique.values())
        self._schedulers = [extra.target for extra in self._extras if isinstance(extra.target, LRScheduler)]
        self._versioned: list[Tensor] = []
        self._parameters: list[Tensor] = []
        self._noted: list[Tensor] = []
        self._gradients: list[weakref.ref[Tensor] | None] = []  # when the last step was over, with their versions
        self._versions: list[int] = []
        self._states: list[Tensor] = []
        self._states_held: tuple[int, ...] = ()
        self._moded: list[nn.Module] = []

    def parameters(self) -> list[Tensor]:
        """All parameters there are yet: the modules' and the optimizers', each once, in a stable order."""
        found = {id(entry): entry for module in self.modules for entry in module.parameters()}
        for optimizer in self.optimizers:
            found |= {id(entry): entry for group in optimizer.param_groups for entry in group["params"]}
        return [entry for entry in found.values() if not is_lazy(entry)]

    def join(self, optimizer: Optimizer, place: int) -> None:
        """Take in an optimizer that is about to step for the first time: earlier snapshots put it back to this."""
        self.optimizers.insert(place, optimizer)
        self._joined[optimizer] = _hyperparameters(optimizer), merge(None, dict(optimizer.state))

    def leave(self, optimizer: Optimizer) -> None:
        """Capture this optimizer no longer; a snapshot that holds it puts it back all the same."""
        self.optimizers.remove(optimizer)
        self._joined.pop(optimizer, None)

    def moment(self) -> Moment:
        """Capture the cheap part alone."""
        return Moment(
            RandomStates.capture(),
            tuple((entry, _hyperparameters(entry)) for entry in self.optimizers),
            tuple((entry, entry.state_dict()) for entry in self._schedulers),
        )

    @torch.no_grad()
    def capture(self, spare: Snapshot | None = None) -> Snapshot:
        """Copy the whole state; costs about one pass over parameters, gradients and optimizer state.

        Args:
            spare: a snapshot that nobody needs any more: its memory is written over, in half the time that fresh memory
                takes.
        """
        parameters = self.parameters()
        buffers = [entry for module in self.modules for entry in module.buffers() if not is_lazy(entry)]
        self._parameters, self._versioned = parameters, [*parameters, *buffers]
        self._states_held = ()  # an optimizer may put new tensors into its state
        self._moded = [entry for module in self.modules for entry in module.modules()]
        known = dict(spare.tensors) if spare else {}
        gradients = {entry: held for entry, _, held in spare.gradients} if spare else {}
        states = dict(spare.optimizer_states) if spare else {}
        extras = spare.extras if spare else (None,) * len(self._extras)
        return Snapshot(
            moment=self.moment(),
            tensors=tuple((entry, merge(known.get(entry), entry.detach())) for entry in (*parameters, *buffers)),
            buffers=tuple(
                (owner, name, entry)
                for module in self.modules
                for owner in module.modules()
                for name, entry in owner._buffers.items()
                if entry is not None
            ),
            gradients=tuple(
                (entry, _reference(entry.grad), merge(gradients.get(entry), entry.grad)) for entry in parameters
            ),
            optimizer_states=tuple((entry, merge(states.get(entry), dict(entry.state))) for entry in self.optimizers),
            modes=tuple((entry, entry.training) for entry in self._moded),
            extras=tuple(entry.capture(old) for entry, old in zip(self._extras, extras, strict=True)),
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Put a captured state back, in place: no parameter, optimizer or module changes its identity.

        Where one of the caller's objects refuses its state, all the rest is put back before `on_error` is told.
        """
        refusals = []
        for owner, name, buffer in snapshot.buffers:
            owner._buffers[name] = buffer
        with torch.no_grad():
            for live, held in snapshot.tensors:
                live.copy_(held)
            for parameter, reference, copied in snapshot.gradients:
                gradient = None if reference is None else reference()
                parameter.grad = _refill(gradient, copied)
        known = dict(snapshot.optimizer_states)
        for optimizer, (groups, states) in self._joined.items():
            if optimizer not in known:
                _restore_optimizer(optimizer, states)
                _restore_groups(optimizer, groups)
        for optimizer, states in known.items():
            _restore_optimizer(optimizer, states)
        for module, training in snapshot.modes:
            module.training = training
        for entry, held in zip(self._extras, snapshot.extras, strict=True):
            try:
                entry.restore(held)
            except Exception as error:  # noqa: BLE001 - the caller's class
                refusals.append(error)
        self.restore_moment(snapshot.moment)
        for refusal in refusals:
            if self.on_error is None:
                raise refusal
            self.on_error(refusal)

    def restore_moment(self, moment: Moment) -> None:
        """Put the cheap part back alone."""
        for optimizer, groups in moment.hyperparameters:
            _restore_groups(optimizer, groups)
        moment.random.restore()
        for scheduler, held in moment.schedulers:
            scheduler.load_state_dict(dict(held))

    def restore_scheduled(self, moment: Moment) -> None:
        """Put back the hyperparameters that a learning-rate scheduler sets which nobody named as stateful.

        A scheduler that has moved on multiplies what it finds: it and a learning rate of an earlier step would disagree
        for good.  It has written `initial_lr` into each group.
        """
        schedulers = leaves_of([extra.target for extra in self._extras], LRScheduler)
        named = {id(getattr(entry, "optimizer", None)) for _, entry in schedulers}
        for optimizer, groups in moment.hyperparameters:
            for group, held in zip(optimizer.param_groups, groups, strict=False):
                if "initial_lr" in held and id(optimizer) not in named:
                    group.update({key: _held(key, value) for key, value in held.items() if key != "params"})

    def note_gradients(self) -> None:
        """A step is over: remember which gradients there are."""
        found = [entry.grad for entry in self._parameters]  # lists, since a pair each would wake the garbage collector
        self._noted = self._parameters
        self._gradients = [None if entry is None else weakref.ref(entry) for entry in found]
        self._versions = [0 if entry is None else entry._version for entry in found]

    def cleared_gradients(self) -> Sequence[Tensor] | None:
        """Parameters whose gradients have been let go of since they were noted; None where others are there now."""
        cleared = []
        for parameter, reference, version in zip(self._noted, self._gradients, self._versions, strict=True):
            gradient = parameter.grad
            if gradient is None and reference is not None:
                cleared.append(parameter)
            elif gradient is not None and (
                reference is None or reference() is not gradient or gradient._version != version
            ):
                return None
        return cleared

    def fingerprint(self) -> tuple[int, ...]:
        """Changes with a write to a captured tensor, an optimizer's state or a replay buffer, and with modes."""
        extras = [tensor for extra in self._extras for tensor in extra.tensors()]
        held = tuple(number for entry in self.optimizers for number in (id(entry.state), len(entry.state)))
        if held != self._states_held:  # made in the first update, or loaded
            states = tensors_of([list(entry.state.values()) for entry in self.optimizers])
            self._states = [
                tensor for path, tensor in states if not (path.endswith("['step']") or tensor.is_inference())
            ]
            self._states_held = held
        return (
            *held,
            sum(map(_VERSION, self._states)),
            sum(map(_VERSION, self._versioned)),
            sum(map(_VERSION, extras)),
            sum(map(_TRAINING, self._moded)),
            sum(map(_REQUIRES_GRAD, self._versioned)),
        )


class _Contents(dict[str, tuple[Tensor, Tensor]]):
    """A replay buffer's tensors by field, each with its copy."""


@dataclass(frozen=True)
class _Extra:
    """One of the caller's own objects and the protocol by which it is captured."""

    target: Any
    protocol: str

    @classmethod
    def of(cls, target: object) -> _Extra:
        if isinstance(target, Tensor):
            return cls(target, "tensor")
        for protocol, names in _PROTOCOLS.items():
            if all(hasattr(target, name) for name in names):
                return cls(target, protocol)
        if _buffer_tensors(target):
            return cls(target, "buffer")
        raise UsageError(
            f"attach: got a stateful {type(target).__name__}, expected state_dict and load_state_dict (or a tensor, a "
            "generator, a replay buffer with tensors examples, labels, logits); add the two methods to it"
        )

    def capture(self, old: Any) -> Any:
        """A copy, in the memory of an `old` one where it fits: a replay buffer may be the most of it."""
        if self.protocol == "tensor":
            return merge(old, self.target.detach())
        if self.protocol == "buffer":
            known = {name: copied for name, (_, copied) in (old or {}).items()}
            tensors = _buffer_tensors(self.target)
            return _Contents((name, (entry, merge(known.get(name), entry))) for name, entry in tensors.items())
        if self.protocol == "bit_generator":
            return copy.deepcopy(self.target.bit_generator.state)
        return copy.deepcopy(getattr(self.target, _PROTOCOLS[self.protocol][0])())

    def restore(self, held: Any) -> None:
        if self.protocol == "tensor":
            with torch.no_grad():
                self.target.copy_(held)
        elif self.protocol == "buffer":
            for name, (tensor, copied) in held.items():
                _assign(self.target, name, tensor.copy_(copied))
        elif self.protocol == "bit_generator":
            self.target.bit_generator.state = copy.deepcopy(held)
        else:
            getattr(self.target, _PROTOCOLS[self.protocol][1])(copy.deepcopy(held))

    def tensors(self) -> list[Tensor]:
        return list(_buffer_tensors(self.target).values())


_PROTOCOLS: Mapping[str, tuple[str, ...]] = {
    "state_dict": ("state_dict", "load_state_dict"),
    "get_state": ("get_state", "set_state"),  # torch.Generator, numpy.random.RandomState
    "getstate": ("getstate", "setstate"),  # random.Random
    "bit_generator": ("bit_generator",),  # numpy.random.Generator
}


def _buffer_tensors(target: object) -> dict[str, Tensor]:
    """The tensors of a replay buffer, an object or a mapping."""
    found = {
        name: target.get(name) if isinstance(target, Mapping) else getattr(target, name, None) for name in BUFFER_FIELDS
    }
    return {name: entry for name, entry in found.items() if isinstance(entry, Tensor)}


def _assign(target: Any, name: str, tensor: Tensor) -> None:
    if isinstance(target, MutableMapping):
        target[name] = tensor
    else:
        setattr(target, name, tensor)


def _hyperparameters(optimizer: Optimizer) -> Groups:
    return tuple({key: _held(key, value) for key, value in group.items()} for group in optimizer.param_groups)


def _held(key: str, value: Any) -> Any:
    if type(value) in PLAIN:
        return value
    return list(value) if key == "params" else clone_tree(value)


def _reference(gradient: Tensor | None) -> weakref.ref[Tensor] | None:
    """Which tensor it was, to put its content back in place; without keeping it once the step has let go of it."""
    return None if gradient is None else weakref.ref(gradient)


def _refill(gradient: Tensor | None, held: Tensor | None) -> Tensor | None:
    """The live gradient with its old content; a new tensor where it is gone, or its shape or layout has changed."""
    if gradient is None or held is None:
        return None if held is None else held.clone()
    if gradient.shape != held.shape or gradient.layout != held.layout or gradient.layout != torch.strided:
        return held.clone()
    return gradient.detach_().copy_(held) if gradient.grad_fn is not None else gradient.copy_(held)


def clone_tree(value: Any) -> Any:
    """Tensors cloned, containers rebuilt, the rest deep-copied: an optimizer's state holds numbers and lists too."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: clone_tree(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(clone_tree(entry) for entry in value)
    if isinstance(value, int | float | str | bool | None) or holds_live(value):
        return value
    return copy.deepcopy(value)


def _restore_optimizer(optimizer: Optimizer, states: Mapping[Tensor, Any]) -> None:
    """In place where the tensors are still there, so that a capturable or fused optimizer keeps its addresses."""
    for key in [key for key in optimizer.state if key not in states]:
        del optimizer.state[key]
    for key, held in states.items():
        optimizer.state[key] = merge(optimizer.state.get(key), held)


def _restore_groups(optimizer: Optimizer, groups: Groups) -> None:
    live = optimizer.param_groups
    del live[len(groups) :]  # one that was added since; a step that adds it may be run again
    live += [{"params": []} for _ in groups[len(live) :]]
    for group, held in zip(live, groups, strict=True):
        group["params"][:] = held["params"]
        group.update({key: _held(key, value) for key, value in held.items() if key != "params"})


def merge(old: Any, new: Any) -> Any:
    """A copy of the tree `new`, in the memory of the tensors of `old` where they fit."""
    if isinstance(new, Tensor):
        with torch.no_grad():
            return old.copy_(new) if type(old) is type(new) and _kind(old) == _kind(new) else new.detach().clone()
    if isinstance(new, dict):
        known = old if isinstance(old, dict) else {}
        return {key: merge(known.get(key), entry) for key, entry in new.items()}
    return clone_tree(new)


def _kind(tensor: Tensor) -> object:
    """What two tensors must share for the one to be written over with the other."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return object()  # equal to no other
    return tensor.shape, tensor.dtype, tensor.device
