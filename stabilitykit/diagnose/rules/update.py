"""Faults of the parameter update itself: gradients and parameters were finite when it began."""

from __future__ import annotations

import math

from stabilitykit.diagnose.rules.base import Evidence, Rule


def _number(evidence: Evidence, name: str) -> float:
    value = evidence.hyperparameters.get(name, math.nan)
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


class LearningRateNotFinite(Rule):
    """The learning rate itself is not finite: a schedule was asked for a step past its end, or divided by zero."""

    name = "lr_not_finite"
    remedies = (
        "bound the schedule: max(0.0, 1 - step / total) ** power, and step it once per optimizer step",
        "check it where it is set: assert math.isfinite(group['lr'])",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "optimizer" and not math.isfinite(
            _number(evidence, "lr") if "lr" in evidence.hyperparameters else 0.0
        )

    def facts(self, evidence: Evidence) -> str:
        return f"lr = {_number(evidence, 'lr')}."


class SettingNotFinite(Rule):
    """A setting of the optimizer other than its learning rate is not finite."""

    name = "setting_not_finite"
    remedies = ("check it where it is set: assert math.isfinite(group['weight_decay'])",)

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "optimizer" and bool(self._bad(evidence))

    def facts(self, evidence: Evidence) -> str:
        return f"{evidence.optimizer} has {', '.join(self._bad(evidence))}."

    def _bad(self, evidence: Evidence) -> list[str]:
        settings = {name: entry for name, entry in evidence.hyperparameters.items() if isinstance(entry, float)}
        return [f"{name} = {entry}" for name, entry in settings.items() if name != "lr" and not math.isfinite(entry)]


class BadOptimizerState(Rule):
    """The optimizer's state held the value when the update began: it was loaded, or an earlier step left it so."""

    name = "bad_optimizer_state"
    remedies = (
        "look at what was loaded: torch.isfinite over the tensors of optimizer.state_dict()['state']",
        "begin with a new optimizer, or drop the parameter's entry: optimizer.state.pop(parameter)",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "optimizer" and evidence.leaf is not None

    def facts(self, evidence: Evidence) -> str:
        return f"{evidence.leaf.summary.describe()}." if evidence.leaf else ""


class NoEpsilon(Rule):
    """The update divided by a measure of the gradient that is exactly zero, the root of a second moment as a rule, and
    epsilon is zero or is lost in the dtype: 0 / 0 for a parameter whose gradient has been zero.
    """

    name = "optimizer_eps"
    remedies = (
        "give the optimizer an epsilon: eps=1e-8 (1e-7 in bfloat16, 1e-4 in float16)",
        "leave parameters without a gradient out: requires_grad_(False) until they are used",
    )

    def applies(self, evidence: Evidence) -> bool:
        names = ("addcdiv", "div", "fused_adam", "fused_adamw", "fused_adagrad", "rsqrt")
        lost = _number(evidence, "eps") < 1e-7 and evidence.narrow
        zero = any(entry.zeros for name, entry in evidence.inputs.items() if name != "self")
        divided = evidence.phase == "optimizer" and evidence.op in names
        return divided and (_number(evidence, "eps") == 0 or lost) and (zero or evidence.kind == "nan")

    def facts(self, evidence: Evidence) -> str:
        return f"{evidence.optimizer} has eps = {_number(evidence, 'eps'):g}."


class UpdateOverflow(Rule):
    """The update pushed a parameter, or the optimizer's own state, past the largest number of its dtype: the step
    (learning rate times gradient, or times weight decay) or the momentum is too large, so that it overshoots.
    """

    name = "update_overflow"
    remedies = (
        "lower this group's learning rate so that lr * weight_decay is far below 1; keep a momentum below 1",
        "clip the gradient before the step: torch.nn.utils.clip_grad_norm_(parameters, 1.0)",
    )

    def applies(self, evidence: Evidence) -> bool:
        overflowed = evidence.kind == "inf" or evidence.op.startswith("fused")  # a kernel may end at Inf - Inf
        return evidence.phase == "optimizer" and overflowed

    def facts(self, evidence: Evidence) -> str:
        known = [
            f"{name} = {_number(evidence, name):g}"
            for name in ("lr", "weight_decay", "momentum")
            if name in evidence.hyperparameters
        ]
        return f"{evidence.optimizer} with {', '.join(known)}." if known else ""


CERTAIN = (LearningRateNotFinite(), SettingNotFinite(), BadOptimizerState(), NoEpsilon())
RULES = (UpdateOverflow(),)
