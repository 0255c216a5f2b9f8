"""Schedulers and scalers that nobody named to `attach`: a replay steps them again, and they are put back after it."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch.amp import GradScaler
from torch.optim.lr_scheduler import LRScheduler


@contextmanager
def bystanders_put_back() -> Iterator[None]:
    """Leave every learning-rate scheduler and GradScaler of the process as the block found it.

    What they were when the step began is not known, so a replay may differ, but the run goes on as it would have.
    """
    held = [(entry, state) for entry in _found() if (state := _state(entry))]
    try:
        yield
    finally:
        for entry, state in held:
            with suppress(Exception), warnings.catch_warnings():  # the caller's class; the run is going on
                warnings.simplefilter("ignore")
                entry.load_state_dict(state)


def _found() -> list[LRScheduler | GradScaler]:
    """All there are: neither knows a place where they are kept."""
    return [entry for entry in gc.get_objects() if issubclass(type(entry), LRScheduler | GradScaler)]


def _state(entry: LRScheduler | GradScaler) -> dict[str, Any] | None:
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(entry.state_dict())
    return None
