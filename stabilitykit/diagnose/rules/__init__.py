"""Cause and remedy by family of faults; the first rule that applies explains the origin."""

import re

from stabilitykit.diagnose.rules import divergence, domain, outside, overflow, state, update
from stabilitykit.diagnose.rules.base import Evidence, Rule

SMALL = re.compile(r"1e-(?:[7-9]|1\d)")
IN_HALF = "in float16 1e-8 is 0 and 1 - 1e-7 is 1: compute this in float32, x.float(), or use 1e-3 in what follows"

RULES: tuple[Rule, ...] = (
    *outside.RULES,
    *update.CERTAIN,
    *divergence.RULES,  # before the operation's own family: it is only where a long way came to its end
    *domain.RULES,
    *overflow.RULES,
    *state.RULES,
    *update.RULES,
)


def explain(evidence: Evidence) -> tuple[str, str, tuple[str, ...]]:
    """Name of the rule, cause, remedies; for an unknown family the facts alone."""
    for rule in RULES:
        if rule.applies(evidence):
            return rule.name, rule.cause(evidence), _fitting(rule.advise(evidence), evidence)
    given = "; ".join(entry.describe() for entry in evidence.inputs.values())
    return "unknown", f"No known family. The operation was given: {given or 'no tensors'}.", ()


def _fitting(remedies: tuple[str, ...], evidence: Evidence) -> tuple[str, ...]:
    """Remedies for the dtype: the small constants that they name are lost in float16."""
    half = evidence.operation is not None and evidence.operation.output.dtype == "float16"
    return (IN_HALF, *remedies) if half and any(SMALL.search(remedy) for remedy in remedies) else remedies


__all__ = ["RULES", "Evidence", "Rule", "explain"]
