"""The last steps in a line each: what a diagnosis shows of the way to a fault."""

from __future__ import annotations

import math
from collections import deque

from stabilitykit.schema import RunUpStep
from stabilitykit.watch.reading import Reading

Largest = tuple[str, float]  # a module output, and its largest magnitude


class RunUp:
    """At most `length` steps, the latest last."""

    def __init__(self, length: int) -> None:
        self._steps: deque[RunUpStep] = deque(maxlen=length)

    def add(self, index: int, reading: Reading, largest: Largest) -> None:
        """A step is over; `largest` is known where its tensors were recorded."""
        self._steps.append(_line(index, reading, largest))

    def describe_again(self, index: int, reading: Reading, largest: Largest) -> None:
        """A step was run again, and recorded in full."""
        for position, known in enumerate(self._steps):
            if known.step == index:
                self._steps[position] = _line(index, reading, largest)

    def steps(self) -> tuple[RunUpStep, ...]:
        """What there is to show."""
        return tuple(self._steps)


def _line(index: int, reading: Reading, largest: Largest) -> RunUpStep:
    return RunUpStep(
        step=index,
        loss=next(iter(reading.losses.values()), math.nan),
        grad_norm=reading.grad_norm,
        parameter_norm=reading.parameter_norm,
        absmax=largest[1],
        absmax_tensor=largest[0],
    )
