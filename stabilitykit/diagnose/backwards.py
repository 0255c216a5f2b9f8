"""The backwards of a replayed step, as they begin and end; the tracer sees only their operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stabilitykit.diagnose.site import ENGINE


@contextmanager
def watching_backward(
    before: Callable[[Sequence[Tensor], bool], None],
    after: Callable[[], None],
    given: Callable[[Sequence[Tensor]], None],
) -> Iterator[None]:
    """Report the roots of every backward in the block, the end of one that accumulates, and gradients handed out.

    A backward has no hook for its roots. `torch.autograd`'s entry points both call one function, which is wrapped,
    during a replay only: user code may hold `torch.autograd.grad` under a name of its own.
    """
    run = getattr(torch.autograd, ENGINE)

    def watched(roots: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        accumulates = bool(kwargs.get("accumulate_grad"))
        before([root for root in roots if isinstance(root, Tensor)], accumulates)
        gradients = run(roots, *args, **kwargs)
        if accumulates:
            after()
        else:
            given([entry for entry in gradients if isinstance(entry, Tensor)])
        return gradients

    setattr(torch.autograd, ENGINE, watched)
    try:
        yield
    finally:
        setattr(torch.autograd, ENGINE, run)
