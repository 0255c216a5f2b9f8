"""What several runs of several methods say together: mean, spread, and paired differences with their confidence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

METRICS = ("class_il", "task_il", "forgetting", "bwt", "fwt", "cpu_seconds")
CONFIDENCE = 0.95

Scores = Mapping[str, Mapping[int, Mapping[str, float]]]  # method, seed, metric


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation (n - 1; nan for one run)."""

    num_runs: int
    mean: float
    sd: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean difference to the baseline over the seeds both have, and its confidence interval.

    Read it as: an interval that leaves out 0 is a difference that seeds do not explain.  The interval is Student's t
    over the paired differences, which takes out what a seed does to both.
    """

    num_pairs: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One method's row."""

    method: str
    spreads: dict[str, Spread]
    differences: dict[str, Difference]  # empty for the baseline itself

    def body(self) -> dict[str, object]:
        """As JSON can hold it."""
        return asdict(self)


def compare(scores: Scores, baseline: str) -> list[Comparison]:
    """A row a method, in the order given."""
    return [
        Comparison(
            method=method,
            spreads={metric: spread([run[metric] for run in runs.values()]) for metric in METRICS},
            differences={}
            if method == baseline or baseline not in scores
            else {metric: _paired(runs, scores[baseline], metric) for metric in METRICS},
        )
        for method, runs in scores.items()
    ]


def _paired(
    runs: Mapping[int, Mapping[str, float]], others: Mapping[int, Mapping[str, float]], metric: str
) -> Difference:
    return difference([runs[seed][metric] - others[seed][metric] for seed in runs if seed in others])


def spread(values: Sequence[float]) -> Spread:
    """Of the values that are numbers."""
    known = [value for value in values if math.isfinite(value)]
    return Spread(
        num_runs=len(known),
        mean=statistics.fmean(known) if known else math.nan,
        sd=statistics.stdev(known) if len(known) > 1 else math.nan,
    )


def difference(pairs: Sequence[float], confidence: float = CONFIDENCE) -> Difference:
    """Mean of paired differences and its interval; without limits where there is one pair only."""
    found = spread(pairs)
    if found.num_runs < 2:
        return Difference(num_pairs=found.num_runs, mean=found.mean, low=-math.inf, high=math.inf)
    half = student_quantile((1 + confidence) / 2, found.num_runs - 1) * found.sd / math.sqrt(found.num_runs)
    return Difference(num_pairs=found.num_runs, mean=found.mean, low=found.mean - half, high=found.mean + half)


def student_quantile(probability: float, freedom: int) -> float:
    """Quantile above the median of Student's t, by bisection on its integral (Simpson's rule); to 6 digits."""
    low, high = 0.0, 1.0
    while _student_integral(high, freedom) < probability - 0.5:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_integral(middle, freedom) < probability - 0.5 else (low, middle)
    return (low + high) / 2


def _student_integral(upper: float, freedom: int, intervals: int = 2000) -> float:
    """Of the density from 0; substituting t = sqrt(freedom) tan(angle) makes the integrand cos^(freedom - 1)."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    width = math.atan(upper / math.sqrt(freedom)) / intervals
    weights = (1 if step in (0, intervals) else 4 if step % 2 else 2 for step in range(intervals + 1))
    total = sum(weight * math.cos(step * width) ** (freedom - 1) for step, weight in enumerate(weights))
    return scale * total * width / 3
