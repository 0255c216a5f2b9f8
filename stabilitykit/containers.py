"""What nested containers and objects hold: the tensors of a batch, and whether it leads to a model."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

T = TypeVar("T")
MAX_DEPTH = 3  # attributes of attributes: objects may refer to each other
MOST_ENTRIES = 4_096  # looked at within an object's attribute: it may hold a data set
PLAIN = frozenset((int, float, bool, str, type(None)))
_NO_CONTAINER = (Tensor, type, ModuleType, FunctionType)


def holds_live(value: Any) -> bool:
    """Whether it is, or leads to, a model, a parameter or an optimizer, of which there must be no second: a trainer.

    What holds too much to look through counts as well, since a copy of it would take too long.
    """
    waiting, met = [value], set[int]()
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, nn.Module | nn.Parameter | Optimizer):
            return True
        if type(entry) in PLAIN or isinstance(entry, _NO_CONTAINER) or id(entry) in met:
            continue
        met.add(id(entry))
        if isinstance(entry, list | tuple | dict | set) and len(entry) > MOST_ENTRIES:
            return True
        waiting += gc.get_referents(entry)  # all that a deep copy might copy, in slots and partials as well
        if len(met) + len(waiting) > MOST_ENTRIES:
            return True
    return False


def tensors_of(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested tuples, lists, mappings and objects, with its path: `[0]`, `.inputs`, `['x']`."""
    return leaves_of(value, Tensor)


def leaves_of(value: Any, kind: type[T], path: str = "", room: list[int] | None = None) -> Iterator[tuple[str, T]]:
    """Everything of one type in nested containers, within an attribute as far as its `room` goes; see `tensors_of`."""
    if isinstance(value, kind):
        yield path, value
    elif type(value) in PLAIN:
        return
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name in value._fields:
            yield from leaves_of(getattr(value, name), kind, f"{path}.{name}", room)
    elif isinstance(value, list | tuple):
        passed = frozenset() if kind in PLAIN else PLAIN
        for index, entry in enumerate(_first(value, room)):
            if type(entry) not in passed:  # thousands of tokens may be
                yield from leaves_of(entry, kind, f"{path}[{index}]", room)
    elif isinstance(value, Mapping):
        for key, entry in _first(value.items(), room):
            yield from leaves_of(entry, kind, f"{path}[{key!r}]", room)
    elif hasattr(value, "__dict__") and not isinstance(value, type | ModuleType | nn.Module | Optimizer | FunctionType):
        for name, entry in vars(value).items():  # a dataclass, a graph, a batch class of the user's own
            if path.count(".") < MAX_DEPTH:
                yield from leaves_of(entry, kind, f"{path}.{name}", [MOST_ENTRIES] if room is None else room)


def _first(entries: Collection[T], room: list[int] | None) -> Iterable[T]:
    """As many as there is room for."""
    if room is None:
        return entries
    before, room[0] = room[0], max(room[0] - len(entries), 0)
    return islice(entries, before)
