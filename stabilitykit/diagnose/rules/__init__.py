"""Cause and remedy by family of faults; the first rule that applies explains the origin."""

from stabilitykit.diagnose.rules import domain, outside, overflow, update
from stabilitykit.diagnose.rules.base import Evidence, Rule

RULES: tuple[Rule, ...] = (*outside.RULES, *update.RULES[:2], *domain.RULES, *overflow.RULES, *update.RULES[2:])


def explain(evidence: Evidence) -> tuple[str, str, tuple[str, ...]]:
    """Name of the rule, cause, remedies; for an unknown family the facts alone."""
    for rule in RULES:
        if rule.applies(evidence):
            return rule.name, rule.cause(evidence), rule.advise(evidence)
    given = "; ".join(entry.describe() for entry in evidence.inputs.values())
    return "unknown", f"No known family. The operation's inputs were finite: {given or 'none were tensors'}.", ()


__all__ = ["RULES", "Evidence", "Rule", "explain"]
