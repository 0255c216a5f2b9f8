"""Cause and remedy by family of faults; the first rule that applies explains the origin."""

from stabilitykit.diagnose.rules import divergence, domain, outside, overflow, state, update
from stabilitykit.diagnose.rules.base import Evidence, Rule

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
            return rule.name, rule.cause(evidence), rule.advise(evidence)
    given = "; ".join(entry.describe() for entry in evidence.inputs.values())
    return "unknown", f"No known family. The operation was given: {given or 'no tensors'}.", ()


__all__ = ["RULES", "Evidence", "Rule", "explain"]
