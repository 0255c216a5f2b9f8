"""What every test stands on: one thread, fixed seeds, and nothing left behind."""

from __future__ import annotations

import functools
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_hooks

torch.set_num_threads(1)
settings.register_profile("here", deadline=None)
settings.load_profile("here")

PATIENCE_SECONDS = 5.0
_HOOKS = {
    f"{owner.__name__}.{name}": getattr(owner, name)
    for owner in (module_hooks, optimizer_hooks)
    for name in dir(owner)
    if name.startswith("_global") and name.endswith(("hooks", "always_called", "with_kwargs"))
}
_SAVED_TENSORS_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", bool)  # since torch 2.7
_PATCHABLE = (
    (torch, ("tensor", "optim")),
    (torch.autograd, ("backward", "grad")),
    (Tensor, ("backward", "item", "tolist", "register_hook")),
    (nn.Module, ("__call__", "__setattr__", "_call_impl", "train")),
    (Optimizer, ("step", "zero_grad", "profile_hook_step")),
    (nn.utils, ("clip_grad_norm_", "clip_grad_value_")),
    (sys, ("excepthook", "unraisablehook", "displayhook")),
    (threading, ("excepthook",)),
    (os, ("write", "writev", "fsync", "fork")),
)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global stream is what a training script uses
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No test of ours leaves a hook, mode, thread, open file, child process or replaced function to the next."""
    before = process_state()

    yield

    assert _differences(before) == {}


@pytest.fixture
def changes() -> Callable[[], Mapping[str, object]]:
    """What `nothing_left_behind` would object to at this moment."""
    return functools.partial(_changed, process_state())


def process_state() -> dict[str, object]:
    """Everything of the process that watching a run touches or might touch; 0.1 ms."""
    hooks = {name: len(held) for name, held in _HOOKS.items() if held}
    functions = {(owner.__name__, name): getattr(owner, name) for owner, names in _PATCHABLE for name in names}
    return {
        "global hooks": hooks,
        "functions": functions,
        "autograd": (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_anomaly_enabled(),
            torch._C._autograd._saved_tensors_hooks_is_enabled(),
            _SAVED_TENSORS_HOOKS(True),
            torch.is_autocast_enabled("cpu"),
        ),
        "modes": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()),
        "settings": (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            tuple(np.geterr().items()),
            gc.isenabled(),
        ),
        "signal handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "threads": {thread.name for thread in threading.enumerate()} - {"tqdm_monitor"},  # of torch.compile's
        "open files": _open_files(),
        "children": _children(),
    }


def _open_files() -> set[tuple[str, str]]:
    """Descriptors and what they are open on, but for the fonts that matplotlib keeps open."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):  # noqa: PTH208 - an order of magnitude cheaper
        with suppress(OSError):  # the listing's own
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))  # noqa: PTH115
    return {entry for entry in found if not entry[1].endswith((".ttf", ".afm"))}


def _children() -> set[str]:
    tasks = os.listdir("/proc/self/task")  # noqa: PTH208
    return {child for task in tasks for child in _text(f"/proc/self/task/{task}/children").split()}


def _text(path: str) -> str:
    with suppress(OSError), Path(path).open() as file:
        return file.read()
    return ""


def _differences(before: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """What has changed, and does not go away with the garbage or in a while: a process that is being reaped does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    changed = _changed(before)
    if changed:
        gc.collect()
    while (changed := _changed(before)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return changed


def _changed(before: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    now = process_state()
    changed = {}
    for name, held in before.items():
        new = now[name]
        if isinstance(held, set) and isinstance(new, set):  # what a test closed is its own business
            held, new = set(), new - held
        if new != held:
            changed[name] = (held, new)
    return changed
