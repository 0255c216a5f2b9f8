"""What each node of the autograd graph differentiates: the tracer asks when a backward runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from stabilitykit.diagnose.site import Site


@dataclass(frozen=True, slots=True)
class Forward:
    """The forward call that a node differentiates."""

    op: str
    module: str
    site: Site


class Forwards:
    """Forward calls by the number of their nodes.

    Autograd numbers a node just before the node's kernel is dispatched, so what has been numbered since the call before
    belongs to the call that is seen now: one node, or several where function transforms (`torch.func`) are nested.
    """

    def __init__(self) -> None:
        self._known: dict[int, Forward] = {}
        self._next = torch._C._autograd._get_sequence_nr()

    def claim(self, forward: Callable[[int], Forward]) -> None:
        """Give the nodes that are new to a forward call, made of the node's number where there are any."""
        end = torch._C._autograd._get_sequence_nr()
        for node in range(self._next, end):
            self._known[node] = forward(node)
        self._next = end

    def running(self) -> Forward | None:
        """What the node that backward is running differentiates, None where that was not seen."""
        node = torch._C._current_autograd_node()
        return self._known.get(node._sequence_nr()) if node is not None else None
