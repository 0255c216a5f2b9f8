"""The numbers among what a training step returns, the loss first; called by the watch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from stabilitykit.containers import tensors_of

MOST = 16  # plain numbers that are looked at: a list of more is data
_WHERE_THE_LOSS_IS = ("['loss']", ".loss", "[0]")


def returned_numbers(returned: Any) -> dict[str, Tensor | float]:
    """Floating-point numbers by their path in what a step returned.

    Tensors of one element count wherever they are; plain numbers, Python's or numpy's, alone or as entries of the
    outermost tuple, list or mapping. The loss is first: the entry or field `loss`, the first entry of a sequence unless
    another has a gradient, else the first tensor.
    """
    found: dict[str, Tensor | float] = {
        path: tensor for path, tensor in tensors_of(returned) if tensor.numel() == 1 and tensor.is_floating_point()
    }
    if isinstance(returned, Tensor):
        return found
    found |= {
        path: float(entry) for path, entry in islice(_entries(returned), MOST) if isinstance(entry, float | np.floating)
    }
    loss = next((path for path in _WHERE_THE_LOSS_IS if path in found), "")
    if loss == "[0]":
        loss = next((path for path, entry in found.items() if isinstance(entry, Tensor) and entry.requires_grad), loss)
    return {loss: found[loss]} | found if loss in found else found


def _entries(returned: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(returned, float | np.floating):
        yield "", returned
    elif isinstance(returned, Mapping):
        yield from ((f"[{key!r}]", entry) for key, entry in returned.items())
    elif isinstance(returned, tuple) and hasattr(returned, "_fields"):
        yield from ((f".{name}", getattr(returned, name)) for name in returned._fields)
    elif isinstance(returned, tuple | list):
        yield from ((f"[{index}]", entry) for index, entry in enumerate(returned))
