"""Module buffers that go bad while training looks healthy."""

from __future__ import annotations

from stabilitykit.diagnose.rules.base import Evidence, Rule


class RunningStatistics(Rule):
    """A module's buffer, running statistics as a rule, went bad while the loss stayed finite: training looks healthy,
    and what reads it, evaluation or a frozen normalisation layer, gives constants or NaN from here on.
    """

    name = "running_statistics"
    remedies = (
        "bound the inputs before the layer: x = x.clamp(-1e4, 1e4), or standardise the data set",
        "find the batch named above and drop its outliers: finite values can be absurd as well",
        "after repair: module.reset_running_stats() and a few forward passes in train mode",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "state" and evidence.operation is not None


RULES = (RunningStatistics(),)
