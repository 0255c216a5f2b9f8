"""A step's arguments, held so that it can be given them again: a step may empty a list, or use up an iterator."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data.dataloader import _BaseDataLoaderIter

from stabilitykit.containers import holds_live, tensors_of
from stabilitykit.random_states import RandomStates

# Modules of generators, zip, chain; of an iterator of any other class, a file say, too little is known.
_PLAIN_ITERATORS = ("builtins", "itertools")
_NO_DATA = (Tensor, type, nn.Module, Optimizer, FunctionType, MethodType, ModuleType)
_AS_IT_IS = frozenset((Tensor, int, float, bool, str, bytes, type(None), np.ndarray))


class Recorded(Iterator[Any]):
    """An iterator that keeps what the step takes, and the random streams as each item left them.

    An iterator gives its items once: a replay that took them from it would get those of the next step.
    """

    __slots__ = ("_source", "_streams", "taken")  # nobody is to look for tensors among its attributes

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source
        self.taken: list[Any] = []
        self._streams: list[RandomStates] = []

    def __next__(self) -> Any:
        item = next(self._source)
        self.taken.append(held_apart(item))
        self._streams.append(RandomStates.capture())
        return item

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __deepcopy__(self, memo: object) -> Recorded:
        return self

    def again(self) -> Iterator[Any]:
        """The same items, the random streams following."""
        return _Again(self.taken, self._streams)


class _Again(Iterator[Any]):
    """Recorded items once more; `items` is where a diagnosis finds what the batch was."""

    def __init__(self, items: Sequence[Any], streams: Sequence[RandomStates]) -> None:
        self.items = held_apart(list(items))
        self._remaining = iter(tuple(zip(self.items, streams, strict=True)))

    def __len__(self) -> int:
        return len(self.items)

    def __bool__(self) -> bool:
        return True

    def __next__(self) -> Any:
        item, streams = next(self._remaining)
        streams.restore()
        return item


class _Sized(Recorded):
    """One that says how many items there are."""

    __slots__ = ()

    def __len__(self) -> int:
        return len(self._source)  # type: ignore[arg-type]


def recorded(value: Any) -> Any:
    """An argument as the step is given it: iterators recorded, everything else itself."""
    is_plain = isinstance(value, Iterator) and type(value).__module__ in _PLAIN_ITERATORS
    if not is_plain and not isinstance(value, _BaseDataLoaderIter):
        return value
    return _Sized(value) if hasattr(value, "__len__") else Recorded(value)


def held_apart(value: Any) -> Any:
    """The same tensors in containers of their own, which the step cannot empty or fill; what is recorded stays so."""
    return _rebuilt(value, _itself)


def given_again(value: Any) -> Any:
    """What was held, for a step that is run again."""
    return _rebuilt(value, Recorded.again)


def _itself(entry: Recorded) -> Recorded:
    return entry


def _rebuilt(value: Any, pass_on: Callable[[Recorded], Any]) -> Any:
    kind = type(value)
    if kind in _AS_IT_IS:  # nearly all there is; every step comes by
        return value
    if kind is tuple or kind is list:
        return kind([entry if type(entry) in _AS_IT_IS else _rebuilt(entry, pass_on) for entry in value])
    if kind is dict:
        return {key: entry if type(entry) in _AS_IT_IS else _rebuilt(entry, pass_on) for key, entry in value.items()}
    if isinstance(value, Recorded):
        return pass_on(value)
    if _is_data(value):
        with suppress(Exception):  # the caller's class
            return copy.copy(value)
    return value


def copied(value: Any) -> Any:
    """The same with tensors of its own, which nobody else writes into; a model, or what holds one, stays itself."""
    kind = type(value)
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) else value.detach().clone()
    if kind is tuple or kind is list:
        return kind([copied(entry) for entry in value])
    if kind is dict:
        return {key: copied(entry) for key, entry in value.items()}
    if kind in _AS_IT_IS - {np.ndarray} or holds_live(value):
        return value
    with suppress(Exception):  # the caller's class
        return copy.deepcopy(value)
    return value


def given_tensors(entries: Iterable[Any]) -> list[Tensor]:
    """The tensors of a batch; those of a trainer among the arguments are state."""
    return [
        tensor
        for entry in entries
        if isinstance(entry, Tensor | tuple | list | dict) or not holds_live(entry)
        for _, tensor in tensors_of(entry)
    ]


def taken_from(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What the step took from its iterators."""
    return [entry.taken for entry in (*args, *kwargs.values()) if isinstance(entry, Recorded)]


def _is_data(value: Any) -> bool:
    """Whether it is a batch of a class of its own, with tensors for attributes; a trainer has a model as well."""
    if isinstance(value, dict | UserDict):
        return True
    if isinstance(value, _NO_DATA) or not hasattr(value, "__dict__"):
        return False
    return any(isinstance(entry, Tensor) for entry in vars(value).values()) and not holds_live(value)
