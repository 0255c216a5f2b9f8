"""Schedulers and scalers that nobody named to `attach`: a replay moves them again, and they are put back after it."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler

_MOVERS = (LRScheduler, ("step",)), (GradScaler, ("scale", "unscale_", "step", "update"))


@contextmanager
def bystanders_put_back() -> Iterator[None]:
    """Leave every learning-rate scheduler and GradScaler that moves in the block as it was before its first move.

    What they were when the step began is not known, so a replay may differ, but the run goes on as it would have.
    Nothing keeps a list of them, so the methods that move them are wrapped, for this thread, while the block lasts.
    """
    held: dict[int, tuple[Any, dict[str, Any]]] = {}
    thread = threading.get_ident()

    def about_to_move(entry: Any) -> None:
        if threading.get_ident() == thread and id(entry) not in held and (state := _state(entry)):
            held[id(entry)] = entry, state

    try:
        with ExitStack() as stack:
            for kind, names in _MOVERS:
                for owner in _with_subclasses(kind):
                    for name in vars(owner).keys() & set(names):
                        stack.callback(setattr, owner, name, vars(owner)[name])
                        setattr(owner, name, _after(about_to_move, vars(owner)[name]))
            yield
    finally:
        for entry, state in held.values():
            with suppress(Exception), warnings.catch_warnings():  # the caller's class; the run is going on
                warnings.simplefilter("ignore")
                entry.load_state_dict(state)


def _after(first: Callable[[Any], None], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def both(entry: Any, *args: Any, **kwargs: Any) -> Any:
        first(entry)
        return method(entry, *args, **kwargs)

    return both


def _with_subclasses(kind: type[Any]) -> set[type[Any]]:
    return {kind}.union(*map(_with_subclasses, kind.__subclasses__()))


def _state(entry: Any) -> dict[str, Any] | None:
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: dict[str, Any] = copy.deepcopy(entry.state_dict())
        return state
    return None
