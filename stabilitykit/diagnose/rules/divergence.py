"""A fault that took many steps to come."""

from __future__ import annotations

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
        return evidence.operation is not None and onset(evidence) is not None

    def facts(self, evidence: Evidence) -> str:
        start = onset(evidence)
        if start is None:
            return ""
        first, last = evidence.run_up[start], evidence.run_up[-1]
        return (
            f"It began at step {first.step:,}: loss {first.loss:.4g}, gradient norm {first.grad_norm:.4g}; at step "
            f"{last.step:,} they were {last.loss:.4g} and {last.grad_norm:.4g}."
        )


def onset(evidence: Evidence, factor: float = 100.0) -> int | None:
    """Position in the run-up from which the loss only grew, by at least `factor` in all; None if it did not."""
    losses = [abs(step.loss) for step in evidence.run_up]
    if len(losses) < 3:
        return None
    start = len(losses) - 1
    while start > 0 and losses[start - 1] <= losses[start] * 1.05:
        start -= 1
    grown = losses[-1] / losses[start] if losses[start] > 0 else float("inf")
    return start if len(losses) - start >= 3 and grown >= factor else None


RULES = (Divergence(),)
