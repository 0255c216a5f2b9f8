"""What every test stands on: one thread, fixed seeds, and nothing left behind."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # torch's own objects leave the generations: a collection after each test stays cheap
settings.register_profile("here", deadline=None)
settings.load_profile("here")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global stream is what a training script uses
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No global hook, dispatch mode, wrapped function or thread of ours outlives a test."""
    backward = torch.autograd.backward
    threads = set(threading.enumerate())

    yield

    gc.collect()
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks
    assert not optimizer_hooks._global_optimizer_pre_hooks
    assert not _get_current_dispatch_mode_stack()
    assert torch.autograd.backward is backward
    assert not [thread for thread in set(threading.enumerate()) - threads if "stabilitykit" in thread.name]
