"""Numbers that grew past what their dtype can hold."""

from __future__ import annotations

import torch

from stabilitykit.diagnose.rules.base import Evidence, Rule


class LossScaleOverflow(Rule):
    """A gradient passed the limit of its narrow dtype during backward, and nothing skipped the step: the loss scale,
    where there is one, is too high for this batch.
    """

    name = "loss_scale"
    remedies = (
        "let the scale adapt and skip: torch.amp.GradScaler with scaler.scale(loss).backward(), scaler.step(optimizer)",
        "use bfloat16, which has float32's range and needs no scale: torch.autocast(device, dtype=torch.bfloat16)",
        "lower a fixed scale by a factor of 16",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "backward" and evidence.narrow and not evidence.computed

    def facts(self, evidence: Evidence) -> str:
        return narrow_facts(evidence)


class NarrowOverflow(Rule):
    """The result does not fit the narrow dtype it was computed or cast to; in float32 it would have been finite."""

    name = "narrow_overflow"
    remedies = (
        "scale before the product, not after: (query * scale) @ key.transpose(-2, -1)",
        "compute this part in float32: with torch.autocast(device, enabled=False): y = f(x.float())",
        "use bfloat16 instead of float16: the same width, float32's range",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.narrow and evidence.computed and evidence.phase in ("forward", "backward", "state")

    def advise(self, evidence: Evidence) -> tuple[str, ...]:
        product = evidence.op in ("mm", "bmm", "addmm", "baddbmm", "mv", "dot")
        return self.remedies if product else self.remedies[1:]

    def facts(self, evidence: Evidence) -> str:
        return narrow_facts(evidence)


def narrow_facts(evidence: Evidence) -> str:
    """The number that overflowed, beside the dtype's limit."""
    operation = evidence.operation
    if operation is None or operation.exact_absmax is None:
        return ""
    dtype = operation.output.dtype
    limit = torch.finfo(getattr(torch, dtype)).max
    return f"Its largest magnitude would have been {operation.exact_absmax:.6g}; {dtype} ends at {limit:.6g}."


class ExpOverflow(Rule):
    """An exponential, or what grows like one (cosh, the Bessel function i0, a matrix's exponential), overflowed: in
    float32 exp(x) is Inf from x = 88.7 on, in float16 from 11.1.
    """

    name = "exp_overflow"
    remedies = (
        "bound the argument: torch.exp(x.clamp(max=20)), and x.clamp(-10, 10) for a log-variance",
        "use a function that grows slower: F.softplus(x)",
        "stay in log space: torch.logsumexp, F.log_softmax, F.binary_cross_entropy_with_logits",
    )

    def applies(self, evidence: Evidence) -> bool:
        growing = ("exp", "exp2", "expm1", "sinh", "cosh", "logcumsumexp", "linalg_matrix_exp", "i0", "special_i1")
        return evidence.op in growing


class PlainOverflow(Rule):
    """Finite inputs gave a result past the largest number of the dtype: huge values, a high power or a product of many
    factors, or a tiny divisor.
    """

    name = "overflow"
    remedies = (
        "find what made the inputs this large: the table of the steps before shows which tensor grew",
        "normalise or clamp before this operation; lower the learning rate if activations grow from step to step",
        "compare in a bounded form: F.smooth_l1_loss or F.huber_loss instead of a square",
    )

    _GROWING = (
        "pow", "prod", "cumprod", "cumsum", "sum", "mul", "addcmul", "mm", "bmm", "addmm", "baddbmm", "mv", "dot",
        "convolution", "linalg_vector_norm",
    )  # fmt: skip

    def applies(self, evidence: Evidence) -> bool:
        divided = evidence.op in ("div", "reciprocal")  # by no zero: see DivisionByZero
        grown = evidence.kind == "inf" and (divided or evidence.op in self._GROWING)
        return evidence.phase in ("forward", "backward") and (evidence.largest > 1e9 or grown)


RULES = (LossScaleOverflow(), NarrowOverflow(), ExpOverflow(), PlainOverflow())
