"""Exact binomial intervals: what so many successes in so many runs can prove."""

from __future__ import annotations

import math
from collections.abc import Callable

BISECTIONS = 60


def exact_interval(successes: int, runs: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Clopper-Pearson interval of a success rate.

    The lower limit is the rate at which so many successes or more have probability (1 - confidence) / 2, the upper one
    that at which so many or fewer have.  1,000 of 1,000 prove 99.63 %, no more.

    Source: Clopper and Pearson, Biometrika 26 (1934).
    """
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _root(lambda rate: 1 - _at_most(successes - 1, runs, rate) - tail)
    high = 1.0 if successes == runs else _root(lambda rate: tail - _at_most(successes, runs, rate))
    return low, high


def _at_most(successes: int, runs: int, rate: float) -> float:
    """Probability of so many successes or fewer."""
    return math.fsum(math.exp(_log_probability(count, runs, rate)) for count in range(successes + 1))


def _log_probability(count: int, runs: int, rate: float) -> float:
    ways = math.lgamma(runs + 1) - math.lgamma(count + 1) - math.lgamma(runs - count + 1)
    return ways + count * math.log(rate) + (runs - count) * math.log1p(-rate)


def _root(rising: Callable[[float], float]) -> float:
    """Where a function that rises from below to above 0 over (0, 1) is 0."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
