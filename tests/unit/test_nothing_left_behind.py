"""The fixture that watches over every test sees what a test might leave."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitykit.record import Recorder

Changes = Callable[[], Mapping[str, object]]


@contextmanager
def global_forward_hook(_: Path) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def global_optimizer_hook(_: Path) -> Iterator[None]:
    handle = register_optimizer_step_post_hook(lambda *_: None)
    yield
    handle.remove()


@contextmanager
def replaced_backward(_: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.autograd, "backward", lambda *_: None)
        yield


@contextmanager
def dispatch_mode(_: Path) -> Iterator[None]:
    with TorchDispatchMode():
        yield


@contextmanager
def gradients_off(_: Path) -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def thread(_: Path) -> Iterator[None]:
    end = threading.Event()
    started = threading.Thread(target=end.wait)
    started.start()
    yield
    end.set()
    started.join()


@contextmanager
def child(_: Path) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield
        process.kill()


@contextmanager
def open_log(folder: Path) -> Iterator[None]:
    recorder = Recorder(folder)
    recorder.write(0)
    yield
    recorder.close()


@pytest.mark.parametrize(
    ("left", "name"),
    [
        (global_forward_hook, "global hooks"),
        (global_optimizer_hook, "global hooks"),
        (replaced_backward, "functions"),
        (dispatch_mode, "modes"),
        (gradients_off, "autograd"),
        (thread, "threads"),
        (child, "children"),
        (open_log, "open files"),
    ],
)
def test_what_a_test_leaves_is_seen(
    left: Callable[[Path], AbstractContextManager[None]], name: str, changes: Changes, tmp_path: Path
) -> None:
    assert changes() == {}

    with left(tmp_path):
        assert name in changes()
