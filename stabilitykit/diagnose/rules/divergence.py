"""A fault that took many steps to come."""

from __future__ import annotations

import math
from itertools import pairwise

from stabilitykit.diagnose.rules.base import Evidence, Rule


class Divergence(Rule):
    """Training diverged: the loss grew step by step until a number overflowed, so the operation named above is only
    where it came to an end.  The cause is an update that overshoots: a learning rate, or the weight of a loss term,
    too high for the curvature it meets.
    """

    name = "divergence"
    remedies = (
        "lower the learning rate by a factor of 3 to 10, or the weight of the term that grows",
        "clip the gradient before the step: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
        "warm up: the first steps after a change of task or data are the steepest",
    )

    def applies(self, evidence: Evidence) -> bool:
        return overflowed(evidence) and onset(evidence) is not None

    def facts(self, evidence: Evidence) -> str:
        start = onset(evidence)
        if start is None:
            return ""
        first, last = evidence.run_up[start], evidence.run_up[-1]
        return (
            f"It began at step {first.step:,}: loss {first.loss:.4g}, gradient norm {first.grad_norm:.4g}; at step "
            f"{last.step:,} they were {last.loss:.4g} and {last.grad_norm:.4g}."
        )


class Overshoot(Rule):
    """A single update threw the parameters far away, and the next step could not hold what came of it: the step size
    times the gradient it met was far too large.
    """

    name = "overshoot"
    remedies = (
        "clip the gradient before the step: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
        "lower the learning rate; warm it up over the first steps",
    )

    def applies(self, evidence: Evidence) -> bool:
        if not overflowed(evidence) or len(evidence.run_up) < 2:
            return False
        before, last = evidence.run_up[-2:]
        thrown = math.inf > last.parameter_norm >= SUDDEN * before.parameter_norm > 0
        usual = max(abs(step.loss) for step in evidence.run_up[:-1])  # one loss alone may be close to 0
        return thrown or abs(last.loss) >= SUDDEN * usual > 0

    def facts(self, evidence: Evidence) -> str:
        before, last = evidence.run_up[-2:]
        return (
            f"From step {before.step:,} to {last.step:,} the loss went from {before.loss:.4g} to {last.loss:.4g} and "
            f"the norm of the parameters from {before.parameter_norm:.4g} to {last.parameter_norm:.4g}."
        )


SUDDEN = 100.0
_NEVER_OVERFLOW_TO_NAN = {
    "acos", "acosh", "asin", "atanh", "div", "erfinv", "fmod", "log", "log10", "log1p", "log2", "logit", "pow",
    "reciprocal", "remainder", "rsqrt", "sqrt", "true_divide",
}  # fmt: skip
SMALLEST, LARGEST = 1e-300, 1e300  # stand for losses of 0, and of Inf and NaN, in a logarithm


def overflowed(evidence: Evidence) -> bool:
    """Whether the origin may be where a growing number met its end: not where a function left its domain, or 0 / 0."""
    return evidence.operation is not None and not (evidence.kind == "nan" and evidence.op in _NEVER_OVERFLOW_TO_NAN)


def onset(evidence: Evidence, factor: float = 100.0) -> int | None:
    """Position in the run-up from which the loss grew, by at least `factor` in all; None if it did not.

    Growth may be noisy: most steps from there go up, and the last is far above all before. It starts at the latest step
    that still had nine tenths of the growth (of the logarithm) ahead, or where the rise to that step began.
    """
    losses = [_magnitude(step.loss) for step in evidence.run_up]
    if len(losses) < 3:
        return None
    last, lowest = losses[-1], min(losses)
    start = max(i for i, loss in enumerate(losses) if math.log(last / loss) >= 0.9 * math.log(last / lowest))
    while start and losses[start - 1] < losses[start]:
        start -= 1
    later = losses[start:]
    rises = sum(after > before for before, after in pairwise(later))
    grown = last >= factor * losses[start] and last >= factor / 10 * max(losses[: start + 1])
    return start if len(later) >= 3 and grown and rises >= 0.6 * (len(later) - 1) else None


def _magnitude(loss: float) -> float:
    return LARGEST if math.isnan(loss) else min(max(abs(loss), SMALLEST), LARGEST)


RULES = (Divergence(), Overshoot())
